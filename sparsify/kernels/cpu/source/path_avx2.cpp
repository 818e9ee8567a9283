// rows.h for AVX2; compiled with its flags, and called where the processor has it.

#include "lanes_avx2.h"
#include "rows.h"

extern const Path AVX2_PATH = {
    run_block<Avx2>, read_bytes<Avx2>, run_dense<Avx2>, Avx2::WIDTH, Avx2::WIDEST
};
