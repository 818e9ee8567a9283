// rows.h for AVX-512; compiled with its flags, and called where the processor has it.

#include "lanes_avx512.h"
#include "rows.h"

extern const Path AVX512_PATH = {
    run_block<Avx512>, read_bytes<Avx512>, run_dense<Avx512>, Avx512::WIDTH, Avx512::WIDEST
};
