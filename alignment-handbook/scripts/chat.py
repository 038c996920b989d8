"""Talk to a model in the terminal; base and aligned side by side on request.

    python alignment-handbook/scripts/chat.py runs/reward_cpu --both

MODEL is a folder, a Hub id, or the folder of a PEFT adapter, whose base then answers too after `/both`; of a merged
model `--base` names it. Each keeps its own side of the conversation. `/help` lists what else can be typed; Ctrl-C stops
an answer. Lines may also come from a pipe.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from alignment import errors


def typed() -> Iterator[str]:
    """Lines from the terminal behind a prompt, or from a pipe."""
    from alignment.sampling.chat import HELP

    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    print(HELP)
    with history():
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:  # at the prompt: the line is dropped
                print()
            except EOFError:
                print()
                return


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Arrows at the prompt, over earlier conversations too, where Python has readline (not on Windows)."""
    try:
        import readline
    except ImportError:
        yield
        return
    file = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nca" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
            file.chmod(0o600)  # what was asked is nobody else's


def main() -> None:
    """Reads the command line and talks."""
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model or an adapter, or a Hub id")
    parser.add_argument("--base", help="the model that MODEL was made of, where it is no adapter or has moved")
    parser.add_argument("--both", action="store_true", help="base and aligned answer from the start on")
    parser.add_argument(
        "--tools",
        metavar="FILE.json",
        help="tools that the model may call, a JSON list of schemas; /tool TEXT says what one returned",
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token at every step")
    parser.add_argument("--top_p", type=float, default=1.0, help="share of the probability mass to sample from")
    parser.add_argument("--seed", type=int, default=0, help="seeds the whole conversation")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                        help="type of the weights; auto: as they were saved")  # fmt: skip
    args = parser.parse_args()
    from alignment.sampling.chat import chat, read_tools_file, speakers  # now: it takes seconds
    from alignment.sampling.sample import SamplingConfig

    config = SamplingConfig(1, args.max_new_tokens, args.temperature, args.top_p, 1, args.seed)
    who, tokenizer = speakers(args.model, args.base, args.dtype, read_tools_file(args.tools))
    chat(typed(), who, tokenizer, config, args.both)


if __name__ == "__main__":
    errors.run(main)
