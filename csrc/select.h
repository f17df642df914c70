#pragma once
#include "params.h"

namespace maskgit {

// Adds the noise to the scores, commits by the rule's count and cut, masks the rest again.
// In: candidates (-1 where not eligible or without a finite logit), confidence = score.
// Out: next_tokens, candidates, confidence as StepResult defines them.
void select_and_remask(StepParams& p);

}  // namespace maskgit
