// Rows of the statistics, in the order of `STATS` in config.py.

#pragma once

namespace pmpo {

enum Stat {
  TOKENS, WEIGHT, POLICY_LOSS, KL, ENTROPY, POWER, ESS, ESS_TARGET, CLIPPED_LOW, CLIPPED_HIGH, RATIO_SUM, RATIO_MAX,
  APPROX_KL, NUM_STATS
};

}  // namespace pmpo
