"""Objectives: from what is known of each token to its loss. One pure function each, by name.

    trainer:
      objective: {name: tis, cap: 2.0}

r = π/π_b of a token, π the policy that is trained and π_b (behaviour) the weights that sampled it,
by the engine's own logprobs; π_p (proximal) the weights at the start of the step; A the advantage;
sg without gradient; clip(r) to [1 - clip_low, 1 + clip_high]. Never is a ratio taken against
logprobs recomputed at the start of a step and called old: it would be 1, and correct nothing.

name           loss of a token                       source
vanilla        -A·log π                              Williams 1992
ppo            -min(r·A, clip(r)·A), for A < 0       Schulman et al. 2017, eq. 7; clip bounds: DAPO
               at most -dual_clip·A                  2025; dual clip: Ye et al. 2020, eq. 5
decoupled_ppo  min(π_p/π_b, cap) × ppo on π/π_p      Hilton et al. 2022; AReaL 2025, eq. 5;
                                                     interpolated π_p: A-3PO (Li et al. 2025)
tis            -sg(min(r, cap))·A·log π              Ionides 2008; IMPALA 2018
cispo          -sg(clip(r))·A·log π                  MiniMax-M1 2025, eqs. 4, 5
topr           -A·log π if A > 0, else               Le Roux et al. 2025, eq. 8
               -sg(min(ρ, 1))·A·log π
kimi15         -A·log π + τ/2·(log ρ)²               Kimi k1.5 2025, eq. 3
gspo           ppo on s = ρ^(1/length)               Zheng et al. 2025, eqs. 5 to 7
masked_is      -sg(w)·A·log π if low ≤ w ≤ high      Liu, Li et al. 2025
icepop         k × ppo on π/π_p if low ≤ k ≤ high,   Ring-1T 2025, eq. 3
               k = π_p/π_b
opmd           -A·log π/(1 + τ)                      Trinity-RFT 2025
supervised     -log π                                (for warm starts)

ρ is the product of r over the sequence (`granularity: sequence`), or r (`token`).

name           over       defaults                   a sample that is k versions old
vanilla        token                                 is trained as if it were new: biased, and more
                                                     so with k; refused with alpha ≥ 1
ppo            token      0.2, 0.28, dual_clip 3     the clip, which should limit the step, is used
                                                     up by what happened in k versions: its tokens
                                                     fall silent
decoupled_ppo  token      0.2, 0.28, cap 2           keeps the whole clip for the step; its weight
                                                     corrects up to the cap
tis            token      cap 2                      is corrected; beyond the cap biased toward π_b
cispo          token      1, 0.28: from 0 to 1.28    as tis, more cautious; no token falls silent
topr           sequence   sign of the advantage      a success is learned at full weight; a failure
                                                     fades as π stops doing it
kimi15         sequence   τ 0.1                      is pulled back to π_b, the harder the farther π
                                                     has moved in k versions; no weights
gspo           sequence   3e-4, 4e-4                 falls silent as a whole once its mean ratio has
                                                     moved by the clip: with stale samples widen it
masked_is      token,     0.5, 2                     is corrected, or left out where it is too far;
               geometric,                            by sequence it is unbiased but for the mask,
               sequence                              and soon all are left out
icepop         token      0.5, 5, clip 0.2, 0.28     as decoupled_ppo, left out instead of capped
opmd           token      τ 1                        as vanilla, by 1/(1 + τ); refused likewise

gspo's clip is of s, a mean over a sequence, not of one token's ratio: its defaults are those of the
paper (section 5.1), for responses of thousands of tokens, whose mean log-ratio hardly moves in the
mini-batches of one fresh batch. Over n tokens s scatters by about 1/√n of what one token's ratio
does; so with short responses, with stale samples, or where engine and trainer differ by 1e-3 and
more (bfloat16), 3e-4 stops nearly all of them, as ratio/clip_fraction tells: set clip_low and
clip_high to a few hundredths. masked_is has the bounds of a token's ratio as defaults; over a
sequence's mean (`geometric`) they leave nothing out: there 0.99 and 1.01 are a start.

opmd and vanilla are refused with mini_batches > 1 too; ages are counted in batches, and of a batch
the later mini-batches meet newer weights. `supervised` has no ratios and is for warm starts alone.

Left-out and stopped tokens stay in the denominators. How tokens are added up is the aggregation
(`aggregation.py`), token_mean unless said otherwise, sequence_mean for gspo. What is added to any
of them: `trainer.kl` and `trainer.entropy_bonus` (`regularisers.py`).

Metrics, the same for all (`flash/telemetry.py`, MORE_METRICS): what clips, masks and caps did, the
weights' percentiles and effective sample size, π/π_b and its effective sample size, KL(π_b ‖ π).
Beside them KL(π_b ‖ π_p), of tokens of age 0, which is the mismatch of engine and trainer, apart
from that of older tokens, which is staleness as well.

To add one: a function of a TokenBatch, its settings in `settings.py`, its line in `choose.py`.
"""
