"""Merge a LoRA adapter into its base model.

    python alignment-handbook/scripts/merge.py runs/reward_cpu --output runs/reward_cpu-merged

Writes safetensors, the tokenizer with its chat template, a generation config that stops where the template does, and a
model card; and checks that they give the adapter's logits. A base that was trained on in 4 bits is merged as those 4
bits say, in whole numbers.
"""

from alignment import errors
from alignment.errors import UserError

QUANTIZED = {"auto": None, "4bit": True, "full": False}


def main() -> None:
    """Reads the command line and merges."""
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("adapter", help="folder or Hub id of a PEFT adapter; its adapter_config.json names the base")
    parser.add_argument("--output", required=True, help="folder to write, new or empty")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                        help="type to keep the weights in; auto: that of the base")  # fmt: skip
    parser.add_argument("--base", help="folder or Hub id of the base, where the one that the adapter names has moved")
    parser.add_argument("--base_weights", choices=list(QUANTIZED), default="auto",
                        help="the base as QLoRA has it, or as it was saved; auto: as recipe.yaml says")  # fmt: skip
    parser.add_argument("--modelfile", action="store_true", help="also write an Ollama Modelfile, see docs/serving.md")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="then upload it to this repository of the Hub")
    args = parser.parse_args()
    if args.base in QUANTIZED:
        raise UserError(f"--base: names the base; for its weights, give --base_weights {args.base}")
    from alignment.merge import merge_adapter, push  # now: it takes seconds

    quantized = QUANTIZED[args.base_weights]
    difference = merge_adapter(args.adapter, args.output, args.dtype, quantized, args.base, args.modelfile)
    print(f"{args.output}: merged; logits as the adapter's to {difference:.1g} of the largest")
    if args.push_to_hub:
        print(push(args.output, args.push_to_hub))


if __name__ == "__main__":
    errors.run(main)
