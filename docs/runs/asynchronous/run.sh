#!/usr/bin/env bash
# GRPO on a real vLLM, synchronous and one and two rollouts ahead: figures, table and picture, in about 10 minutes.
#   VLLM_COMMAND=vllm/bin/vllm docs/runs/asynchronous/run.sh [SEED …]
# The server has core 0, the trainer core 1. docs/runs/vllm/README.md has the installation of vLLM on a CPU.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=runs/asynchronous
port=${PORT:-8123}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
mkdir -p $out
test -f $out/policy/complete.json || OMP_NUM_THREADS=2 python "$here/make_policy.py"

VLLM_SERVER_DEV_MODE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
    setsid taskset -c 0 "${VLLM_COMMAND:-vllm}" serve $out/policy --port $port --served-model-name policy \
    --dtype float32 --logprobs-mode processed_logprobs --max-model-len 192 --max-num-seqs 96 --enforce-eager \
    > $out/vllm.log 2>&1 &
server=$!
trap 'kill -- -$server' EXIT

train() {
    taskset -c 1 rlhf grpo --config "$here/grpo.yaml" --rollout_server_url http://127.0.0.1:$port --use_cpu --overwrite "$@"
}
# Compiles the server's kernels, which is no part of the comparison.
train --max_staleness 1 --max_steps 3 --output_dir $out/warm
for seed in ${@:-1 2 3}; do
    for staleness in 0 1 2; do
        train --max_staleness $staleness --seed $seed --output_dir $out/ahead$staleness-seed$seed
    done
done
python "$here/plot.py"
