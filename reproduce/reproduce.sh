#!/usr/bin/env bash
# The table of docs/notebook/results.md from nothing: two judges, a supervised start, PPO with three seeds and two ablations,
# evaluation, plots.
#
#   bash reproduce/reproduce.sh            hours on two cores; stopped at any point, the same command goes on from there
#   bash reproduce/reproduce.sh --quick    minutes, on a small part of everything: proves the way, says nothing about the result
#   bash reproduce/reproduce.sh ppo-1 eval-ppo-1    these stages alone, so that several GPUs or machines can share the work out
#
# Hub names or folders, by the environment: DATA (dialogues), POLICY (causal LM), ENCODER (for the judges).
# OUT is the folder for what is made (runs/reproduce), RESULTS the one for tables and figures (docs/notebook), SEEDS the seeds,
# SFT_EPOCHS how long the supervised start is trained (2; two hours at most), PPO options for every PPO run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DATA=${DATA:-daily_dialog}
POLICY=${POLICY:-HuggingFaceTB/SmolLM2-135M}
ENCODER=${ENCODER:-sentence-transformers/all-MiniLM-L6-v2}
SEEDS=${SEEDS:-0 1 2}
sft=(--max-minutes 120 --epochs "${SFT_EPOCHS:-2}" --eval-samples 1000) judge=(--epochs 2) eval=() only=()
read -ra ppo <<<"${PPO:-}"
if [[ ${1:-} == --quick ]]; then
    OUT=${OUT:-runs/reproduce-quick} RESULTS=${RESULTS:-runs/reproduce-quick/results}
    judge=(--max-minutes 1 --eval-samples 200) sft=(--max-minutes 1 --eval-samples 32)
    ppo+=(--total-time-steps 600 --env-num 16 --validation-limit 0 --judge-samples 200) eval=(--limit 32 --bootstrap 100)
elif [[ ${1:-} == -* ]]; then
    echo "reproduce.sh takes --quick, names of stages, or nothing; it was given: $*" >&2
    exit 2
else
    only=("$@")
fi
if [[ ${1:-} == --quick && $# -gt 1 ]]; then
    echo "reproduce.sh --quick takes nothing else; it was given: $*" >&2
    exit 2
fi
known=" judge second_judge sft eval-sft no-kl no-meteor eval-no-kl eval-no-meteor "
for seed in $SEEDS; do known+="ppo-$seed eval-ppo-$seed "; done
for name in ${only[@]+"${only[@]}"}; do
    if [[ $known != *" $name "* ]]; then
        echo "reproduce.sh has no stage '$name'; it has:$known" >&2
        exit 2
    fi
done
OUT=${OUT:-runs/reproduce} RESULTS=${RESULTS:-docs/notebook}
mkdir -p "$OUT/done"

# bf16 pays where the hardware computes in it; elsewhere it is slower than fp32. A GPU takes larger batches of pairs in the same time
precision=no
if command -v nvidia-smi >/dev/null; then
    precision=bf16
    judge+=(--batch-size 64 --lr 1.4e-4) ppo+=(--micro-batch-tokens 4096)
elif grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then
    precision=bf16
fi

stage() { # NAME COMMAND...: runs it unless an earlier call brought it to its end, or others were asked for
    local name=$1
    shift
    if [[ ${#only[@]} -gt 0 && " ${only[*]} " != *" $name "* || -e $OUT/done/$name ]]; then return; fi
    echo "== $name: $*"
    "$@"
    touch "$OUT/done/$name"
}

whole() { # FOLDER COMMAND...: for programs that write a folder once they are done, and keep what they go on from
    if [[ ! -e $1/config.json ]]; then "${@:2}" --resume --output-dir "$1"; fi
}

train() { # NAME OPTIONS...: PPO; from its newest checkpoint where there is one
    local name=$1 resume=()
    shift
    if compgen -G "$OUT/$name/checkpoints/update-*" >/dev/null; then resume=(--resume); fi
    accelerate launch ppo_dialog.py --config configs/smollm2_daily_dialog.yaml --data-path "$DATA" \
        --model-path "$OUT/sft" --intent-model "$OUT/judge" --mixed-precision "$precision" \
        --run-dir "$OUT" --experiment-name "$name" ${ppo[@]+"${ppo[@]}"} "$@" ${resume[@]+"${resume[@]}"}
}

evaluate() { # NAME: replies, which are kept, then their scores
    local name=$1 replies=$OUT/replies/$1.jsonl evaluation=(python eval_metrics.py --data-path "$DATA" --skip-bad-rows
        --split validation --no-perplexity --mixed-precision "$precision" ${eval[@]+"${eval[@]}"})
    if [[ ! -e $replies ]]; then
        "${evaluation[@]}" --model-path "$OUT/$name" --batch-size 128 --bootstrap 1 --replies "$replies"
    fi
    "${evaluation[@]}" --model-path "$replies" --baseline-path "$OUT/replies/sft.jsonl" \
        --intent-model "$OUT/judge" --second-intent-model "$OUT/second_judge" --output "$OUT/eval/$name.json"
}

data=(--data-path "$DATA" --skip-bad-rows --mixed-precision "$precision")
stage judge whole "$OUT/judge" python intent_classifier.py --model-path "$ENCODER" --half even "${data[@]}" "${judge[@]}"
stage second_judge whole "$OUT/second_judge" \
    python intent_classifier.py --model-path "$ENCODER" --half odd --seed 1 "${data[@]}" "${judge[@]}"
stage sft whole "$OUT/sft" python sft_dialog.py --model-path "$POLICY" --template dialogue --loss-on dialogue --batch-size 16 \
    --lr 2e-4 --warmup-steps 20 --eval-every 200 "${data[@]}" "${sft[@]}"
stage eval-sft evaluate sft
for seed in $SEEDS; do
    stage "ppo-$seed" train "ppo-$seed" --seed "$seed"
    stage "eval-ppo-$seed" evaluate "ppo-$seed"
done
stage no-kl train no-kl --kl-coef 0
stage no-meteor train no-meteor --meteor-coef 0 --consensus-coef 0
for name in no-kl no-meteor; do
    stage "eval-$name" evaluate "$name"
done
if [[ ${#only[@]} -gt 0 ]]; then exit; fi
python reproduce/results.py "$OUT" --results "$RESULTS" --seeds $SEEDS
