#define MASKGIT_ISA isa_avx2
#define MASKGIT_LANES 8
#include "decode_step-inl.h"

namespace maskgit {
extern const ScoreRows score_rows_avx2 = MASKGIT_ISA::score_rows;
}
