#!/usr/bin/env bash
# Rounds of on-policy alignment: sample, score, convert, align, merge; each round starts from the model of the last.
#
#   alignment-handbook/scripts/iterate.sh RECIPE ROUNDS OUTPUT_DIR [flags of run_reward.py ...]
#   NUM_SAMPLES=8 alignment-handbook/scripts/iterate.sh yamls/reward_cpu.yaml 3 runs/iterate --max_steps=16
#
# Settings are environment variables; their defaults are below. Started again in the same way, a run that was killed goes
# on where it stopped. OUTPUT_DIR/round-N/ has samples.jsonl, scored.jsonl, train.jsonl, run/ and merged/, the round's model.
# It ends with the held-out score of each round, for which the recipe needs eval_file and reward_function.
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;; esac
fail() { echo "error: $1" >&2; exit 2; }
[ $# -ge 3 ] && [ -f "$1" ] && [[ "$2" =~ ^[1-9][0-9]*$ ]] ||
  fail "usage: iterate.sh RECIPE ROUNDS OUTPUT_DIR [flags of run_reward.py ...]; RECIPE is a file, ROUNDS a number"
recipe=$1 rounds=$2 out=$3
shift 3

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$scripts/../.." && pwd)  # of the clone; of a wheel, the folder that run_reward.py is in as well
PYTHON=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
LAUNCH=${LAUNCH:-$PYTHON}  # of run_reward.py; on several GPUs "accelerate launch --config_file ... --num_processes=8"

key() {  # the recipe's value; nothing where it has none
  "$PYTHON" -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1])).get(sys.argv[2]) or "")' "$recipe" "$1"
}
MODEL=${MODEL:-$(key model_name_or_path)}                   # of the first round
PROMPTS=${PROMPTS:-$(key train_file)}                       # of reward data, the prompts are taken
REWARD_FUNCTION=${REWARD_FUNCTION:-$(key reward_function)}  # FILE.py:NAME
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-$(key max_new_tokens)}     # longer responses are left out
NUM_SAMPLES=${NUM_SAMPLES:-6}                               # responses a prompt
MIN_RESPONSES=${MIN_RESPONSES:-4}                           # rows with fewer different ones are left out
TEMPERATURE=${TEMPERATURE:-1.0}
[ -n "$PROMPTS" ] || fail "no prompts: set PROMPTS to a file, or train_file in $recipe"
[ -n "$REWARD_FUNCTION" ] || fail "nothing to score with: set REWARD_FUNCTION=FILE.py:NAME, or reward_function in $recipe"
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-256}

# A folder is of one experiment: steps that are done are skipped, so those to come must have the same settings.
settings="$(cksum < "$recipe") $MODEL $PROMPTS $REWARD_FUNCTION $MAX_NEW_TOKENS $NUM_SAMPLES $MIN_RESPONSES $TEMPERATURE $*"
mkdir -p "$out"
[ ! -f "$out/settings.txt" ] || [ "$(cat "$out/settings.txt")" = "$settings" ] ||
  fail "$out holds rounds with other settings (settings.txt); name another folder"
echo "$settings" > "$out/settings.txt"

step() {  # FILE SCRIPT ARGUMENTS...: runs a script unless the file that it writes is there
  [ -e "$1" ] || "$PYTHON" "$scripts/$2" "${@:3}"
}
runs=()
for round in $(seq "$rounds"); do
  dir=$out/round-$round run=$out/round-$round/run
  echo "round $round of $rounds, from $MODEL"
  step "$dir/samples.jsonl" sample.py "$PROMPTS" --model_name_or_path "$MODEL" --output "$dir/samples.jsonl" \
    --num_samples "$NUM_SAMPLES" --max_new_tokens "$MAX_NEW_TOKENS" --temperature "$TEMPERATURE" --seed "$round" \
    --finished_only
  step "$dir/scored.jsonl" score.py "$dir/samples.jsonl" --reward_function "$REWARD_FUNCTION" --output "$dir/scored.jsonl"
  step "$dir/train.jsonl" convert.py "$dir/scored.jsonl" --to list --min_responses "$MIN_RESPONSES" \
    --output "$dir/train.jsonl"
  if [ ! -e "$run/train_results.json" ]; then
    resume=
    compgen -G "$run/checkpoint-*/trainer_state.json" > /dev/null && resume=--resume_from_checkpoint=true
    $LAUNCH "$root/run_reward.py" "$recipe" "$@" --model_name_or_path="$MODEL" --train_file="$dir/train.jsonl" \
      --output_dir="$run" $resume
  fi
  MODEL=$run  # of full fine-tuning, it is the model itself
  if [ -e "$run/adapter_config.json" ]; then
    step "$dir/merged" merge.py "$run" --output "$dir/merged"
    MODEL=$dir/merged
  fi
  runs+=("$run")
done
"$PYTHON" "$scripts/compare_rounds.py" "${runs[@]}"
