"""Merge a LoRA adapter into its base model, in float32.

    python alignment-handbook/scripts/merge.py runs/reward_cpu --output runs/reward_cpu_merged

Writes safetensors and the tokenizer with its chat template, and checks that they give the adapter's logits.
"""

from alignment import errors
from alignment.merge import merge_adapter


def main() -> None:
    """Reads the command line and merges."""
    parser = errors.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("adapter", help="folder of a PEFT adapter; its adapter_config.json names the base")
    parser.add_argument("--output", required=True, help="folder to write, new or empty")
    args = parser.parse_args()
    difference = merge_adapter(args.adapter, args.output)
    print(f"{args.output}: merged; logits as the adapter's to {difference:.1g} of the largest")


if __name__ == "__main__":
    errors.run(main)
