#!/usr/bin/env bash
# A reward model of real preferences, then PPO against it, then whose answers it prefers on held-out prompts.
#   MODEL=SmolLM2-135M-Instruct DATA=folder-of-preferences docs/runs/reward-and-ppo/run.sh [reward] [ppo]
# DATA holds preferences_train.jsonl.gz and preferences_eval.jsonl.gz.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=runs/reward-and-ppo
mkdir -p $out
cp "$DATA"/preferences_{train,eval}.jsonl.gz $out/
for part in train eval; do python "$here/make_prompts.py" $out/preferences_$part.jsonl.gz $out/prompts_$part.jsonl; done
for name in ${@:-reward ppo}; do
    rlhf "$name" --config "$here/$name.yaml" --model_name_or_path "$MODEL" --overwrite
    cp "$out/$name/trainer_state.json" "$here/${name}_state.json"
    cp "$out/$name/all_results.json" "$here/${name}_results.json"
done
python "$here/win_rate.py" "$MODEL" $out/ppo $out/reward $out/prompts_eval.jsonl "$here/win_rate.json"
python "$here/plot.py"
