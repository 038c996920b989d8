"""What NCA adds to TRL: losses over K scored responses, and the log-prob engine under them.

In the order in which rows meet the files: `columns` takes them, `responses` makes token ids of them, by `rendering`
(messages through the chat template, and which of their tokens count) and `fitting` (lengths); `sampler` orders rows,
`collate` packs them into a batch with its `layout`, `chunks` cuts the batch to the memory there is and `pieces` a
response (`keys` keeps what later ones look at), `logps` runs it through a model that is patched by `shared_prompt`
(attention; `sharing` says for which models, `flash` and `two_part` by which kernels), `rotary`, `head` (with its
`cross_entropy`), `layers`, `norms` and `one_pass` (by `kernels`), once `self_check` has held the result against the
model's own; `router` balances the experts of a mixture, and `token_metrics` logs what the head sees.
`loading` loads 4-bit models that will be sharded.
`adapter_reference` gives a policy the reference's weights, `reference` keeps the reference's log-probs on disk, and
`divergence` says how far the policy has moved from it.
`objective` makes losses of log-probs, by the table in `losses`; these and `metrics` know no model.

Around the step: `config` has the settings, `loss_config` those of the loss, and `user_code` loads functions of a user's
file; `step_metrics` gathers metrics, `checkpoints` writes checkpoints whole, `preemption` stops on SIGTERM, `nonfinite`
skips steps that are not finite, `distributed`, `code_hash` and `paper` are small helpers, `stops` knows the tokens at
which sampling stops, and `portable` makes saved folders readable elsewhere. `seams` names what the trainers override in
upstream's.

The trainers themselves are in `nca_trainer`, and can be imported from here: they are looked up when they are asked for,
so that a part of this package costs no more than itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nca_trainer import NCAConfig, NCATrainer, PairwiseNCATrainer

__all__ = ["NCAConfig", "NCATrainer", "PairwiseNCATrainer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module("trl_nca.config" if name == "NCAConfig" else "nca_trainer")
    except ModuleNotFoundError as error:
        if error.name != "nca_trainer":
            raise
        raise ImportError(
            f"{name} is in nca_trainer.py, which `pip install .` at the repository's root brings"
        ) from None
    return getattr(module, name)
