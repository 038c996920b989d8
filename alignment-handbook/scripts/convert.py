"""Converts reward data of any known form to rows in list form or to pairs.

    python alignment-handbook/scripts/convert.py INPUT [INPUT ...] --to list --output rewards.jsonl --report reports/
    python alignment-handbook/scripts/convert.py ultrafeedback.jsonl --to pairs --make_pairs best_random \
        --drop_sources truthful_qa false_qa --output pairs.parquet

The ending of the output says its format: .jsonl, .jsonl.gz or .parquet. docs/data.md has the forms of the input and the
rules for bad rows; `--help` lists all options. Any machine; no GPU.
"""

from pathlib import Path

from alignment import errors
from alignment.data.convert import ConvertConfig, convert
from alignment.data.report import summary
from alignment.errors import UserError
from alignment.files import write_json
from alignment.recipe.parse import StrictParser
from alignment.report.data_figures import draw_data_report


def main() -> None:
    """Parses the command line, converts, and prints the short report."""
    parser = StrictParser([ConvertConfig])
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or Hub ids")
    try:
        config, rest = parser.parse_args_into_dataclasses(look_for_args_file=False)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    report = convert(rest.inputs, config)
    if config.report:
        folder = Path(config.report)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "data_report.json", report)
        draw_data_report(report, folder / "data_report.png")
    print(summary(config.output, report))


if __name__ == "__main__":
    errors.run(main)
