"""Rules of the divergence of the loss: which settings of loss_fn can be combined with kl_type."""

from __future__ import annotations

from distill.config.loss import LossConfig
from distill.errors import UserError

FLOOR_KL_TYPES = ("forward", "reverse", "mixed", "sampled")
"""Values of kl_type that can be combined with ``outside_topk: floor``."""


def check_divergence(loss: LossConfig, key: str = "loss_fn.kl_type") -> None:
    """Raise UserError if kl_type cannot be combined with outside_topk or entry_clip, or if jsd_beta is invalid.

    ``key``: the configuration key that ``loss.kl_type`` was read from.
    """
    if loss.kl_type == "sampled" and loss.entry_clip is not None:
        raise UserError(
            f"loss_fn.entry_clip={loss.entry_clip} cannot be combined with {key}=sampled, which compares the "
            "models at one token only",
            "remove loss_fn.entry_clip, or limit the loss of a token with loss_fn.token_kl_cap",
            key="loss_fn.entry_clip",
            value=loss.entry_clip,
        )
    if loss.outside == "floor" and loss.kl_type not in FLOOR_KL_TYPES:
        floor, also = (
            ("loss_fn.zero_outside_topk=true", " and remove loss_fn.zero_outside_topk")
            if loss.zero_outside_topk
            else ("loss_fn.outside_topk=floor", "")
        )
        raise UserError(
            f"{key}={loss.kl_type} cannot be combined with {floor}",
            f"set loss_fn.outside_topk=bucket{also}",
            key=key,
            value=loss.kl_type,
        )
    if loss.kl_type == "jsd" and not 0 < loss.jsd_beta < 1:
        raise UserError(
            f"loss_fn.jsd_beta={loss.jsd_beta} is not strictly between 0 and 1, as {key}=jsd requires",
            f"set it between 0 and 1, or set {key}={'reverse' if loss.jsd_beta <= 0 else 'forward'}",
            key="loss_fn.jsd_beta",
            value=loss.jsd_beta,
        )
