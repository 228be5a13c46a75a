#!/usr/bin/env bash
# GRPO, then PPO, of the same model on a reward that can be verified: one sentence of at most 20 words.
#   MODEL=SmolLM2-135M-Instruct DATA=folder-of-preferences docs/runs/one-sentence/run.sh [grpo] [ppo]
# DATA holds preferences_train.jsonl.gz and preferences_eval.jsonl.gz, whose questions are the prompts.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=runs/one-sentence
mkdir -p $out
python "$here/make_data.py" "$DATA/preferences_train.jsonl.gz" $out/prompts_train.jsonl 2000
python "$here/make_data.py" "$DATA/preferences_eval.jsonl.gz" $out/prompts_eval.jsonl 100
for name in ${@:-grpo ppo}; do
    rlhf "$name" --config "$here/$name.yaml" --model_name_or_path "$MODEL" --overwrite
    cp "$out/$name/trainer_state.json" "$here/${name}_state.json"
    python "$here/samples.py" "$out/$name/completions.jsonl" "$here/${name}_samples.jsonl"
done
python "$here/plot.py"
