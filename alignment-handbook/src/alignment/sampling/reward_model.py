"""Reward models: sequence classifiers with one output, over prompt and response in the chat template."""

import math

import torch
from jinja2 import TemplateError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignment.data.row import Response, Row, as_turns
from alignment.errors import UserError
from alignment.input_limits import check_input, input_limits
from trl_nca.rendering.written import lost_part


class RewardModel:
    """Scores rows with a reward model, on the GPUs where there are some.

    Args:
        name: Folder or Hub id.
        batch_size: Responses in a forward.
        dtype: Type of the weights, "auto" as they were saved.

    Raises:
        UserError: It cannot be loaded, has no head or one with another number of outputs, or has no chat template.
    """

    def __init__(self, name: str, batch_size: int, dtype: str = "auto"):
        self.name, self.batch_size = name, batch_size
        try:
            self.model, info = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, device_map="auto" if torch.cuda.is_available() else None, output_loading_info=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"reward_model: {name} cannot be loaded ({reason}); check the path") from error
        # transformers only warns of a head that the files do not have, and draws one at random.
        if info["missing_keys"] or self.model.config.num_labels != 1:
            missing = ", ".join(sorted(info["missing_keys"])) or "nothing"
            raise UserError(
                f"reward_model: {name} is no reward model: it has {self.model.config.num_labels} outputs, and lacks "
                f"{missing}; give a sequence classifier with one output"
            )
        if self.tokenizer.chat_template is None:
            raise UserError(f"reward_model: the tokenizer of {name} has no chat template; save it with one")
        if self.tokenizer.pad_token_id is None:  # as TRL's RewardTrainer has it
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # The score is read at the last token that is no padding.
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model.eval()
        self.limits = input_limits(self.model)

    def __call__(self, rows: list[Row], locations: list[str]) -> list[list[float]]:
        """Scores of the rows' responses.

        Args:
            rows: `prompt` as messages, and `responses` (K texts or lists of messages).
            places: Locations of the rows, for errors.

        Raises:
            UserError: The chat template refuses a row or leaves out a part of a response, a row is more than the model
                can read, or a score is not finite.
        """
        placed = list(zip(rows, locations, strict=True))
        ids = [self._encode(row, response, location) for row, location in placed for response in row["responses"]]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        scores = [0.0] * len(ids)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, score in zip(batch, self._forward([ids[i] for i in batch]), strict=True):
                scores[i] = score
        left = iter(scores)
        return [[next(left) for _ in row["responses"]] for row in rows]

    def _encode(self, row: Row, response: Response, location: str) -> list[int]:
        messages = [*row["prompt"], *as_turns(response)]
        options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
        try:
            ids = self.tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
        except (TemplateError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{location}: the chat template of {self.name} refuses the row: {error}") from error
        if isinstance(response, list):
            rendering = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
            # Earlier reasoning is not always to be read.
            lost = [lost_part(rendering, {**turn, "reasoning_content": ""}) for turn in response]
            for part in filter(None, lost):
                raise UserError(f"{location}: the chat template of {self.name} leaves out {part} of a response")
        fix = "leave the row out, or take a reward model that reads more"
        check_input(self.limits, ids, 0, f"{location}, for {self.name}", fix)
        return ids

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> list[float]:
        padded = self.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        scores = self.model(**padded.to(self.model.device)).logits[:, 0].tolist()  # (N,)
        if not all(map(math.isfinite, scores)):
            raise UserError(f"reward_model: {self.name} gives scores that are not finite; try --dtype float32")
        return scores
