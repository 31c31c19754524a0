"""Configuration keys of the loss: loss_fn.*."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Outside = Literal["bucket", "renormalize", "floor"]
"""How the loss treats the tokens outside the top-k; the values are explained at LossConfig.outside_topk."""


KlType = Literal["mixed", "forward", "reverse", "jsd", "sampled"]
"""Divergences of the loss; the values are explained at LossConfig.kl_type."""


@dataclass(frozen=True)
class PositionSigmoidConfig:
    """Weight that rises from w_min to 1 over a response: w_min + (1 - w_min) sigmoid((f - tau) / s).

    f = (t - 1/2) / T is the position of token t (1 to T) in a response of T tokens.
    """

    w_min: float = 0.25
    """Weight at the start of a response, from 0 to 1."""
    tau: float = 0.3
    """Position f, from 0 to 1, at which the weight is halfway between w_min and 1."""
    s: float = 0.1
    """Width of the rise, above 0; smaller values make it steeper."""


@dataclass(frozen=True)
class SelectConfig:
    """Train only on the highest-scoring tokens of each response; all other tokens get weight 0."""

    score: Literal["student_entropy", "teacher_entropy", "divergence", "soft_or"] = "student_entropy"
    """Score of a token. student_entropy, teacher_entropy: entropy of the model's distribution; divergence: the loss of
    the token; soft_or: h + d - h d, with student entropy h and divergence d scaled to 0..1 within each response. All
    except teacher_entropy need the student's logits a second time."""
    share: float = 0.5
    """Fraction of each response's tokens with a position weight that is selected, above 0 and at most 1; the number is
    rounded up. In a tie, earlier tokens are selected."""


@dataclass(frozen=True)
class TokenWeightsConfig:
    """Weights of the response tokens in the loss: factors that are multiplied; they have no gradient.

    t = 1 to T are the tokens of a response, f = (t - 1/2) / T is a token's position.
    """

    skip_first: int = 0
    """Number of tokens at the start of each response that get weight 0."""
    first: int | None = None
    """Number of tokens at the start of each response to train on; later tokens get weight 0 and neither model reads
    them; null: all tokens."""
    position_slope: float = 0.0
    """Slope a, from -1 to 1, of the factor 1 + a (2 f - 1): positive values weight late tokens more."""
    position_sigmoid: PositionSigmoidConfig | None = None
    """Factor that rises over the response (PW-OPSD), usually with normalize: sequences; null: no factor."""
    select: SelectConfig | None = None
    """Selection of the most informative tokens (TIP); null: all tokens."""
    prefix_importance: float = 0.0
    """Strength gamma of the factor 1 + gamma (1 - sum over k < t of |A_k| / sum over all k of |A_k|), where A_k is the
    teacher's log-prob of token k minus the sampler's (IW-OPD: 0.5). The factor of off-policy responses is 1."""
    min_teacher_prob: float = 0.0
    """Tokens to which the teacher gives a lower probability get weight 0."""
    normalize: Literal["tokens", "weights", "sequences"] = "tokens"
    """Divisor of the summed loss of an optimizer batch. tokens: the number of all response tokens, with any weight;
    weights: the sum of the weights; sequences: the loss is the mean over responses of their weighted means, so that
    each response counts equally."""

    @property
    def reads_sampled_token(self) -> bool:
        """Return whether the weights depend on the teacher's probability of the sampled token."""
        return self.prefix_importance > 0 or self.min_teacher_prob > 0

    @property
    def depends_on_models(self) -> bool:
        """Return whether the weights depend on outputs of the models, and not only on positions."""
        return self.select is not None or self.reads_sampled_token


@dataclass(frozen=True)
class LossConfig:
    """Settings of the loss: the divergence between teacher and student at every response token."""

    kl_type: KlType = "mixed"
    """Divergence. forward: KL(teacher || student); reverse: KL(student || teacher); mixed: both, weighted by
    mixed_kl_weight; jsd: generalized Jensen-Shannon divergence, with jsd_beta; sampled: KL(student || teacher)
    estimated from the sampled token, with log student - log teacher as the cost of a policy gradient."""
    mixed_kl_weight: float = 0.5
    """Weight w in kl_type mixed: the loss is w KL(teacher || student) + (1 - w) KL(student || teacher)."""
    jsd_beta: float = 0.5
    """Weight b, between 0 and 1, of the teacher in kl_type jsd: the loss is b KL(teacher || m) +
    (1 - b) KL(student || m) with m = b teacher + (1 - b) student."""
    importance_ratio_cap: float = 2.0
    """Maximum importance ratio of a response token, for kl_type sampled; larger ratios are set to this value. The
    ratio is the student's probability of the token in training divided by its probability in generation."""
    support: Literal["teacher", "student"] = "teacher"
    """Model that selects the distillation.topk_logits_k most likely tokens, over which both models are compared. With
    student, the teacher's LM head stays on the GPU during training, to score these tokens."""
    token_kl_cap: float | None = None
    """Maximum loss of a response token, in nats. A token with a larger loss gets a smaller weight, so its gradient is
    not zero; null: no maximum."""
    entry_clip: float | None = None
    """Maximum contribution of one vocabulary entry to the loss of a token, in nats: the terms of the divergence's sum
    are clipped before they are added, and clipped terms have no gradient (OPSD: 0.05). The tokens outside the top-k,
    as one outcome, are not clipped; null: no maximum."""
    token_weights: TokenWeightsConfig = field(default_factory=TokenWeightsConfig)
    """Weights of the response tokens, and selection of the tokens that the student trains on."""
    zero_outside_topk: bool | None = None
    """NeMo-RL's name for outside_topk. false: renormalize; true: floor; null: the value of outside_topk. If both keys
    are set in different places, the command line overrides the recipe, and the recipe overrides its parent recipes."""
    outside_topk: Outside | None = None
    """Treatment of the vocabulary outside the top-k. bucket: all tokens outside count as one outcome with their
    summed probability, so the loss is a lower bound of the full KL; renormalize: both models' probabilities are
    renormalized over the top-k; floor: the teacher's log-prob of each token outside is -100; null: as set by
    zero_outside_topk, or bucket if that key is also null."""
    temperature: float | None = None
    """Divisor of both models' logits in the loss; null: policy.generation.temperature."""
    logits_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the student's logits. bfloat16 is faster, with an error of about 0.02 nats per log-prob. The teacher's
    logits are float32."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of the loss. auto: Triton kernels on GPUs, PyTorch on CPUs; triton: Triton kernels; torch:
    PyTorch."""

    @property
    def outside(self) -> Outside:
        """Return the treatment of the vocabulary outside the top-k, from outside_topk and zero_outside_topk."""
        if self.outside_topk is not None:
            return self.outside_topk
        if self.zero_outside_topk is None:
            return "bucket"
        return "floor" if self.zero_outside_topk else "renormalize"
