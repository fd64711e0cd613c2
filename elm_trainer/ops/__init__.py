"""The tensor kernels: losses of positions, means over texts, and the LM head read in chunks."""

from .head import STATES, FinalLogits, KeepPositions, ReadHead, Reading, final_logits, read_positions
from .objectives import (
    LogTarget,
    SparseDistribution,
    argmax_cross_entropy,
    disagreement,
    erasure_target,
    kl_divergence,
    kl_to_reference,
    log_mean_probs,
    log_space_divergence,
    log_space_loss,
    log_space_target,
    mean_log_probs,
    plausible_tokens,
    position_weights,
    ramped_eta,
    soft_cross_entropy,
    text_mean,
    text_means,
    text_sums,
    top_k_distribution,
)
