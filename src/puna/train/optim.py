"""The optimizers, of torch and torchao, and the parameter groups for weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from puna.errors import UserError
from puna.train.options import OptimOptions

EMBEDDINGS = ("embed_tokens", "lm_head")
AVERAGES = ("exp_avg", "exp_avg_sq")


def check_optim(options: OptimOptions, ranks: int = 1) -> None:
    """Raises UserError for invalid values, and for an optimizer that can't run on `ranks` processes."""
    if options.name == "adamw8bit" and ranks > 1:
        raise UserError(
            "optim.name adamw8bit keeps its state in blocks that can't be sharded: use it on one device, or"
            " optim.state bf16 on several."
        )
    betas = options.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optim.betas takes two numbers from 0 to below 1, as in 0.9,0.95, not {betas}.")
    if options.lr <= 0 or options.eps <= 0 or min(options.weight_decay, options.clip, options.z_loss) < 0:
        raise UserError("optim: lr and eps must be above 0; weight_decay, clip and z_loss 0 or more.")
    if options.state == "bf16" and options.name != "adamw":
        raise UserError(f"optim.state bf16 goes with adamw; {options.name} has a state of its own.")


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], options: OptimOptions) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, vectors (norms, biases) do not, embeddings as the options say."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            embedding = not options.decay_embeddings and any(part in EMBEDDINGS for part in name.split("."))
            (kept if parameter.dim() < 2 or embedding else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(parameters: Mapping[str, nn.Parameter], options: OptimOptions) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters, which all have one dtype.

    The schedule sets the learning rate before every step. Raises UserError when a library is missing.
    """
    groups = decay_groups(parameters.items(), options)
    if not groups:
        raise UserError("Nothing is trained: every parameter is frozen.")
    adam: dict[str, Any] = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    if options.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=options.lr)
    if options.name == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise UserError("optim.name adamw8bit needs torchao: pip install 'puna[train]'.") from None
        return AdamW8bit(groups, **adam)
    dtype = groups[0]["params"][0].dtype
    state = torch.bfloat16 if options.state == "bf16" else torch.promote_types(dtype, torch.float32)
    if state != dtype:
        return AdamWOwnState(groups, state, **adam)
    return torch.optim.AdamW(groups, **adam, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao compiles its step, where a number would be a constant
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def for_disk(state: dict[str, Any]) -> dict[str, Any]:
    """The state with each 8-bit tensor replaced by its plain component tensors, which share its memory.

    torch.distributed.checkpoint doesn't know torchao's type. Loading into the components fills the 8-bit tensors.
    """
    optimizer: dict[str, Any] = {}
    for name, value in state["optimizer"].items():
        if type(value).__name__ == "OptimState8bit":
            optimizer |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale}
        else:
            optimizer[name] = value
    return state | {"optimizer": optimizer}


class AdamWOwnState(torch.optim.AdamW):
    """AdamW whose state has another dtype than the weights: bfloat16 beside float32, or the reverse.

    torch's kernel takes one dtype for all, so the state is cast, updated and rounded back one weight at a time.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **adam: Any) -> None:
        super().__init__(groups, **adam, fused=True)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. `closure` must be None; the signature is torch's."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in AVERAGES:
                state[name] = torch.zeros_like(parameter, dtype=self.dtype)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        weight, averages = parameter.to(wide), [state[name].to(wide) for name in AVERAGES]
        beta1, beta2 = group["betas"]
        adamw(
            [weight], [gradient.to(wide)], [averages[0]], [averages[1]], [], [state["step"]],
            fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip
        if weight is not parameter:
            parameter.copy_(weight)
        for name, value in zip(AVERAGES, averages, strict=True):
            state[name] = value.to(self.dtype)  # also after load_state_dict, which gives the weight's type
