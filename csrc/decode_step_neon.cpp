#define MASKGIT_ISA isa_neon
#define MASKGIT_LANES 4
#include "decode_step-inl.h"

namespace maskgit {
extern const ScoreRows score_rows_neon = MASKGIT_ISA::score_rows;
}
