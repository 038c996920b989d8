"""The keys of a recipe that choose the loss."""

import math
from dataclasses import dataclass, field

from trl_nca.losses import Loss
from trl_nca.losses.own import file_hash, find_loss, loss_name


@dataclass
class LossConfig:
    """The part of `NCAConfig` that chooses the loss. Needs no trl."""

    loss_type: str = field(
        default="NCA",
        metadata={
            "help": "Loss, in any case. For any K: NCA, InfoNCA, PL, QRPO, OAPL, GVPO; for pairs: DPO, robustDPO, "
            "SimPO, IPO, biasedNCA; or a function of your own, FILE.py:NAME. docs/choosing.md compares them. "
            "run_preference.py has no default, because TRL's is another."
        },
    )
    beta: float = field(
        default=0.01,
        metadata={
            "help": "Multiplies the log-ratio policy / reference, summed over the response's tokens. Larger keeps the "
            "policy closer to the reference. Must be > 0."
        },
    )
    alpha: float = field(
        default=1e-4,
        metadata={
            "help": "Temperature of the targets softmax(score / alpha) of NCA and InfoNCA, in the unit of the scores. "
            "Small is one-hot on the best response, large is uniform; 0 is exactly one-hot, ties sharing the weight. "
            "Not used with pairs, nor by PL, QRPO, OAPL and GVPO."
        },
    )
    tie_break: float = field(
        default=0.0,
        metadata={
            "help": "Added to the first response's score before the targets, in the unit of the scores. 0.01 is what "
            "the 2024 scripts did."
        },
    )
    normalize: str = field(
        default="none",
        metadata={
            "help": "tokens: implicit rewards are divided by the response's tokens, and beta is then of the order of 1 "
            "to 10 (Tulu 3: DPO, 5). none: they are sums. IPO and SimPO always divide.",
            "choices": ["none", "tokens"],
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Probability that the label of a pair is wrong, below 0.5. DPO is then conservative, robustDPO "
            "unbiased. For losses of pairs with labels: DPO, robustDPO, SimPO, biasedNCA."
        },
    )
    margin: float | None = field(
        default=None,
        metadata={
            "help": "By how much the better response's implicit reward is to exceed the other's, in the losses of "
            "pairs with labels: SimPO's gamma. None: 0.5 for SimPO, else 0."
        },
    )
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the log-probs of tokens past the end of the prompt's shortest response (LD-DPO), 0 to "
            "1: 1 and None are without effect, 0 leaves them out."
        },
    )
    sft_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the negative log-likelihood of the best response, a mean over its tokens in the global "
            "batch (of held-out rows over those of each response), which is added to the loss. As TRL's loss_type "
            "[sigmoid, sft] with loss_weights [1, sft_weight]."
        },
    )
    reference_free: bool = field(
        default=False,
        metadata={
            "help": "Implicit rewards are beta times the policy's own log-probs, without a reference. SimPO always is."
        },
    )
    loss_file_hash: str | None = field(
        default=None,
        metadata={
            "help": "SHA-256 of the file of a loss of your own: written into the run's recipe, where it refuses a file "
            "that has changed since. Not to be given by hand."
        },
    )

    @property
    def loss(self) -> Loss:
        """The loss that loss_type names."""
        return find_loss(self.loss_type, self.loss_file_hash)

    @property
    def per_token(self) -> bool:
        """Whether implicit rewards are divided by the response's tokens."""
        return self.normalize == "tokens" or self.loss.per_token

    @property
    def has_reference(self) -> bool:
        """Whether implicit rewards are against the reference."""
        return not (self.reference_free or self.loss.reference_free)

    @property
    def margin_of_best(self) -> float:
        """What is taken off the best response's implicit reward in the loss."""
        return self.loss.margin if self.margin is None else self.margin

    def check_loss(self) -> None:
        """Finds the loss, and checks its settings.

        Raises:
            ValueError: It is not there, or a setting is out of its range or not for this loss.
        """
        try:
            self.loss_type = loss_name(str(self.loss_type))
            loss = find_loss(self.loss_type)
        except ValueError as error:
            raise ValueError(f"loss_type: {error}") from error
        if not self.beta > 0:
            raise ValueError(f"beta: must be > 0, got {self.beta}")
        if not self.alpha >= 0:
            raise ValueError(f"alpha: must be >= 0, got {self.alpha}")
        content = file_hash(self.loss_type)
        if self.loss_file_hash not in (None, content):
            raise ValueError(
                f"loss_file_hash: {self.loss_type} is not the file that the run began with, or none; bring that file "
                "back, or remove the key"
            )
        self.loss_file_hash = content
        self.normalize = str(self.normalize).lower()
        if self.normalize not in ("none", "tokens"):
            raise ValueError(f"normalize: none or tokens; got {self.normalize!r}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: from 0 to below 0.5, got {self.label_smoothing}")
        for key in ("label_smoothing", "margin"):
            if getattr(self, key) and not loss.has_labels:
                raise ValueError(f"{key}: is for losses of pairs with labels, and {self.loss_type} has none; remove it")
        if not math.isfinite(self.margin or 0.0):
            raise ValueError(f"margin: must be a finite number, got {self.margin}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha: from 0 to 1, got {self.ld_alpha}")
        if not 0 <= self.sft_weight < math.inf:
            raise ValueError(f"sft_weight: must be >= 0, got {self.sft_weight}")
        if self.sft_weight and self.ld_alpha not in (None, 1):
            raise ValueError(
                "sft_weight: a response has one log-prob, and ld_alpha changes it: the likelihood would not be that of "
                "the best response; remove one of the two"
            )
