#define MASKGIT_ISA isa_scalar
#define MASKGIT_LANES 1
#include "decode_step-inl.h"

namespace maskgit {
extern const ScoreRows score_rows_scalar = MASKGIT_ISA::score_rows;
}
