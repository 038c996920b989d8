"""Aligns a language model with preference pairs, by the NCA, DPO, InfoNCA (= DPO) or biasedNCA loss.

The same run as `run_reward.py`, with two responses a prompt and the chosen one as the target.

On a CPU, the embedded model and data:

    python run_preference.py yamls/preference_cpu.yaml --loss_type=DPO

On 8 GPUs:

    accelerate launch --config_file alignment-handbook/recipes/accelerate_configs/multi_gpu.yaml --num_processes=8 \
        --main_process_port=7000 run_preference.py yamls/preference_qlora.yaml --gradient_accumulation_steps=4 \
        --beta=0.01 --loss_type=DPO --output_dir=data/test_run
"""

import sys

from alignment import errors
from alignment.recipe.flags import check_command_line

if __name__ == "__main__":  # now: the imports below take seconds
    errors.run(lambda: check_command_line(sys.argv[1:], __doc__))

from nca_trainer import PairwiseNCATrainer
from run_reward import align

if __name__ == "__main__":
    errors.run(lambda: align(sys.argv[1:], PairwiseNCATrainer), exit_on_sigterm=True)
