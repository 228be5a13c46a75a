#!/bin/sh
# The table of README.md: sh docs/runs/memory/run.sh MODEL PAIRS.jsonl
# MODEL: HuggingFaceTB/SmolLM2-135M-Instruct. PAIRS.jsonl: rows of prompt, chosen and rejected, such as the first 5,000 of
# trl-lib/ultrafeedback_binarized.
set -e
exec python "$(dirname "$0")/measure.py" "$@"
