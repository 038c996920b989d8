"""What surrounds a training run: recipes, data, models, planning, sampling, evaluation, reports.

It imports `trl_nca` and no trainer. tests/test_house.py has the order in which its parts import each other.
"""

import logging

# On CPUs with bfloat16, and PEFT imports it everywhere, bitsandbytes asks for a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
