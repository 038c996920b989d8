"""What surrounds a training run: recipes, data, models, sampling, reports. Knows no loss and no trainer."""

import logging

# On CPUs with bfloat16, and PEFT imports it everywhere, bitsandbytes asks for a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
