#define MASKGIT_ISA isa_avx512
#define MASKGIT_LANES 16
#include "decode_step-inl.h"

namespace maskgit {
extern const ScoreRows score_rows_avx512 = MASKGIT_ISA::score_rows;
}
