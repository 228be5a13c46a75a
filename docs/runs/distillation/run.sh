#!/usr/bin/env bash
# A student of half the teacher's layers: hard labels alone, the teacher in memory, the teacher on disk, then its own answers.
#   MODEL=SmolLM2-135M-Instruct DATA=folder-of-preferences docs/runs/distillation/run.sh [student teacher hard live cached gkd eval plot]
# DATA holds preferences_train.jsonl.gz and preferences_eval.jsonl.gz (rows of prompt, chosen, rejected).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=runs/distillation
train=$DATA/preferences_train.jsonl.gz held_out=$DATA/preferences_eval.jsonl.gz
export HF_HUB_DISABLE_PROGRESS_BARS=1

learn() { # name, command, further options
    local began=$SECONDS
    rlhf "$2" --config "$here/$1.yaml" --dataset_name "$train" --overwrite "${@:3}"
    echo "{\"seconds\": $((SECONDS - began))}" >"$here/$1_seconds.json"
    cp $out/$1/trainer_state.json "$here/$1_state.json"
}
judge() { # name, student: on 200 held-out rows
    rlhf eval --model_name_or_path "$2" --teacher_model_name_or_path "$MODEL" --dataset_name "$held_out" --dataset_split 'train[:200]' --dtype float32 \
        --batch_size 2 --max_length 512 --drop_long_prompts --output_file "$here/eval_$1.json"
}
on_own_answers() { # name, student: KL(student, teacher) where the student goes by itself, over 64 held-out prompts
    rlhf distill --config "$here/gkd.yaml" --model_name_or_path "$2" --teacher_model_name_or_path "$MODEL" \
        --dataset_name "$held_out" --output_dir $out/own_$1 --overwrite --learning_rate 0 --max_steps 4
    cp $out/own_$1/trainer_state.json "$here/own_$1.json"
}
rows=(--dataset_train_split 'train[:1200]' --eval_dataset_name "$held_out" --dataset_test_split 'train[:48]')
for name in ${@:-student teacher hard live cached gkd eval plot}; do
    case $name in
    student) rm -rf $out/student && rlhf student --from "$MODEL" --layers 15 --dtype float32 --output_dir $out/student ;;
    teacher)
        began=$SECONDS
        rlhf teacher --model_name_or_path "$MODEL" --dtype float32 --dataset_name "$train" --dataset_split 'train[:1200]' \
            --max_length 512 --drop_long_prompts --k 32 --output_dir $out/teacher --overwrite
        echo "{\"seconds\": $((SECONDS - began)), \"bytes\": $(du -sb $out/teacher | cut -f1)}" >"$here/teacher.json"
        ;;
    hard) learn hard sft --model_name_or_path $out/student "${rows[@]}" ;;
    live) learn live distill --model_name_or_path $out/student --teacher_model_name_or_path "$MODEL" "${rows[@]}" ;;
    cached) learn cached distill --model_name_or_path $out/student "${rows[@]}" ;;
    gkd) learn gkd distill --model_name_or_path $out/live --teacher_model_name_or_path "$MODEL" \
        --dataset_train_split 'train[1200:]' ;;
    eval)
        judge start $out/student
        for student in hard live cached gkd; do judge $student $out/$student; done
        for student in live gkd; do on_own_answers $student $out/$student; done
        ;;
    plot) python "$here/plot.py" ;;
    esac
done
