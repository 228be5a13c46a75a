#!/usr/bin/env bash
# Supervised fine-tuning on the chosen answers, then DPO on the pairs, with evaluations on held-out rows in between.
#   MODEL=SmolLM2-135M-Instruct DATA=folder-of-preferences docs/runs/smollm2-135m/run.sh
# DATA holds preferences_train.jsonl.gz and preferences_eval.jsonl.gz (rows of prompt, chosen, rejected).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=runs/smollm2-135m
train=$DATA/preferences_train.jsonl.gz held_out=$DATA/preferences_eval.jsonl.gz
export HF_HUB_DISABLE_PROGRESS_BARS=1

evaluate() { # name, model, further options
    rlhf eval --model_name_or_path "$2" --dataset_name "$held_out" --dtype float32 --batch_size 1 \
        --max_length 512 --drop_long_prompts --output_file "$here/eval_$1.json" "${@:3}"
}
rlhf sft --config "$here/sft.yaml" --model_name_or_path "$MODEL" --dataset_name "$train" \
    --eval_dataset_name "$held_out" --dataset_test_split 'train[:48]'
cp $out/sft/trainer_state.json "$here/sft_state.json"
rlhf dpo --config "$here/dpo.yaml" --model_name_or_path $out/sft --dataset_name "$train" \
    --eval_dataset_name "$held_out" --dataset_test_split 'train[:32]'
cp $out/dpo/trainer_state.json "$here/dpo_state.json"

evaluate base "$MODEL" --num_completions 3
evaluate sft $out/sft --ref_model_name_or_path "$MODEL" --num_completions 3
evaluate dpo $out/dpo --ref_model_name_or_path $out/sft --num_completions 3
python "$here/plot.py"
