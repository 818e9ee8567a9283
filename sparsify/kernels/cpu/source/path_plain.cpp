// rows.h without instructions of any one processor.

#define KEEP_LOOPS

#include "lanes_plain.h"
#include "rows.h"

extern const Path PLAIN_PATH = {
    run_block<Plain>, read_bytes<Plain>, run_dense<Plain>, Plain::WIDTH, Plain::WIDEST
};
