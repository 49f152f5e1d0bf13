#!/usr/bin/env bash
# The tables of docs/notebook/results.md from nothing: two judges, a reward model, a supervised model, four estimators with three
# seeds each, two ablations, evaluation at several temperatures, tables and figures.
#
#   bash reproduce/reproduce.sh            a day on two cores; stopped at any point, the same command goes on from there
#   bash reproduce/reproduce.sh --quick    minutes, on a small part of everything: a check that it runs, not a result
#   bash reproduce/reproduce.sh ppo-1 eval-ppo-1    these stages alone, so that several GPUs or machines can share the work out
#
# Hub names or folders, by the environment: DATA (dialogues), POLICY (causal LM), ENCODER (for judges and the reward model).
# OUT is the folder for what is made (runs/reproduce), RESULTS the one for tables and figures (docs/notebook), SEEDS the
# seeds, KINDS the estimators (ppo critic rloo grpo; the first fills the table of gains), SFT_EPOCHS how long the supervised
# start is trained (2; two hours at most), CONFIG the settings of PPO. JUDGE, SFT, PAIRS, PPO and EVAL are further options for
# judges, supervised model, reward model, every run of PPO and every evaluation. SPLIT is the split of the evaluation
# (validation), whose files are in OUT/SPLIT. TEMPERATURES, TOP_PS and FRONTIER_LIMIT are those of the frontier. A stage that
# is done is not repeated with other settings, except that a frontier gets further temperatures and values of top-p.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DATA=${DATA:-daily_dialog}
POLICY=${POLICY:-HuggingFaceTB/SmolLM2-135M}
ENCODER=${ENCODER:-sentence-transformers/all-MiniLM-L6-v2}
SPLIT=${SPLIT:-validation}
CONFIG=${CONFIG:-configs/smollm2_daily_dialog.yaml}
sft=(--max-minutes 120 --epochs "${SFT_EPOCHS:-2}" --eval-samples 1000) judge=(--epochs 2) eval=() only=()
pairs=(--pairs 6000 --batch-size 32 --lr 1.5e-4 --epochs 2 --eval-every 80)
read -ra ppo <<<"${PPO:-}"
read -ra more_judge <<<"${JUDGE:-}"
read -ra more_sft <<<"${SFT:-}"
read -ra more_pairs <<<"${PAIRS:-}"
read -ra more_eval <<<"${EVAL:-}"
if [[ ${1:-} == --quick ]]; then
    OUT=${OUT:-runs/reproduce-quick} RESULTS=${RESULTS:-runs/reproduce-quick/results}
    judge=(--max-minutes 1 --eval-samples 200) sft=(--max-minutes 1 --eval-samples 32)
    pairs=(--pairs 64 --max-minutes 1 --eval-samples 16)
    ppo+=(--total-time-steps 600 --env-num 16 --validation-limit 0 --judge-samples 200) eval=(--limit 32 --bootstrap 100)
    SEEDS=${SEEDS:-0 1} KINDS=${KINDS:-ppo rloo} TEMPERATURES=${TEMPERATURES:-0.5 1.0 1.5} TOP_PS=${TOP_PS:-1.0} FRONTIER_LIMIT=32
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
SEEDS=${SEEDS:-0 1 2}
read -ra kinds <<<"${KINDS:-ppo critic rloo grpo}"
read -ra temperatures <<<"${TEMPERATURES:-0.4 0.6 0.8 1.0 1.2 1.4}"
read -ra top_ps <<<"${TOP_PS:-1.0 0.9}"
choose_estimator() { # KIND: sets `estimator` to its options
    case $1 in
    ppo) estimator=() ;; # without a critic: subtracts the mean score of the prompt's other replies
    critic) estimator=(--value-coef 0.5 --gae-lambda 0.95) ;;
    rloo | grpo) estimator=(--advantage "$1") ;;
    *)
        echo "KINDS has '$1'; reproduce.sh has the estimators ppo, critic, rloo and grpo" >&2
        exit 2
        ;;
    esac
}
for kind in "${kinds[@]}"; do choose_estimator "$kind"; done # a wrong name ends here, before any work
policies=()
for seed in $SEEDS; do
    for kind in "${kinds[@]}"; do policies+=("$kind-$seed"); done
done
known=" judge second_judge sft reward_model eval-sft frontier-sft best-sft no-kl no-meteor eval-no-kl eval-no-meteor "
for name in "${policies[@]}"; do known+="$name eval-$name frontier-$name matched-$name over-best-$name "; done
for name in ${only[@]+"${only[@]}"}; do
    if [[ $known != *" $name "* ]]; then
        echo "reproduce.sh has no stage '$name'; it has:$known" >&2
        exit 2
    fi
done
OUT=${OUT:-runs/reproduce} RESULTS=${RESULTS:-docs/notebook}
HERE=$OUT/$SPLIT
mkdir -p "$OUT/done" "$HERE/done"

# bf16 pays where the hardware computes in it; elsewhere it is slower than fp32. A GPU takes larger batches of pairs in the same time
precision=no
if command -v nvidia-smi >/dev/null; then
    precision=bf16
    judge+=(--batch-size 64 --lr 1.4e-4) ppo+=(--micro-batch-tokens 4096)
elif grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then
    precision=bf16
fi

run() { # DONE NAME COMMAND...: runs a stage unless the file DONE says that it came to its end, or others were asked for
    local done=$1 name=$2
    shift 2
    if [[ ${#only[@]} -gt 0 && " ${only[*]} " != *" $name "* ]]; then return; fi
    if [[ -e $done ]]; then
        if [[ ${#only[@]} -gt 0 ]]; then echo "$name is done; to repeat it, remove what it made and '$done'"; fi
        return
    fi
    echo "== $name: $*"
    "$@"
    touch "$done"
}
stage() { run "$OUT/done/$1" "$@"; }    # of training
measure() { run "$HERE/done/$1" "$@"; } # of a split

whole() { # FOLDER COMMAND...: for programs that write a folder once they are done, and keep what they go on from
    if [[ ! -e $1/config.json ]]; then "${@:2}" --resume --output-dir "$1"; fi
}

train() { # NAME OPTIONS...: PPO; from its newest checkpoint where there is one
    local name=$1 resume=()
    shift
    if compgen -G "$OUT/$name/checkpoints/update-*" >/dev/null; then resume=(--resume); fi
    accelerate launch ppo_dialog.py --config "$CONFIG" --data-path "$DATA" \
        --model-path "$OUT/sft" --intent-model "$OUT/judge" --mixed-precision "$precision" \
        --run-dir "$OUT" --experiment-name "$name" ${ppo[@]+"${ppo[@]}"} "$@" ${resume[@]+"${resume[@]}"}
}

evaluation=(python eval_metrics.py --data-path "$DATA" --skip-bad-rows --split "$SPLIT" --no-perplexity --batch-size 128
    --mixed-precision "$precision" ${eval[@]+"${eval[@]}"} ${more_eval[@]+"${more_eval[@]}"})
start=$HERE/replies/sft.jsonl # what the supervised model answers at temperature 1

judged=(--intent-model "$OUT/judge" --second-intent-model "$OUT/second_judge" --reward-models "$OUT/reward_model")

score_texts() { # OUTPUT MODEL BASELINE OPTIONS...: without judges and reward model; MODEL may be a file of replies
    if [[ ! -e $1 ]]; then "${evaluation[@]}" --model-path "$2" --baseline-path "$3" --output "$1" "${@:4}"; fi
}
score() { score_texts "$@" "${judged[@]}"; } # with them

supervised() { # FILE OPTIONS...: what the supervised model answers, which is kept
    if [[ ! -e $1 ]]; then "${evaluation[@]}" --model-path "$OUT/sft" --bootstrap 1 --replies "$1" "${@:2}"; fi
}

evaluate() { # NAME: against the supervised model, and once more as RL4LMs counts
    local replies=$HERE/replies/$1.jsonl
    if [[ $1 == sft ]]; then
        supervised "$replies"
        score "$HERE/eval/sft.json" "$replies" "$start"
    else
        score "$HERE/eval/$1.json" "$OUT/$1" "$start" --replies "$replies"
    fi
    score_texts "$HERE/eval/$1-rl4lms.json" "$replies" "$start" --scoring rl4lms
}

measure_frontier() { # NAME: done once all temperatures and top-p are
    run "$HERE/done/frontier-$1 ${temperatures[*]} ${top_ps[*]}" "frontier-$1" frontier "$1"
}

frontier() { # NAME: quality and diversity at several temperatures and top-p
    local top_p temperature point
    for top_p in "${top_ps[@]}"; do
        for temperature in "${temperatures[@]}"; do
            point=$HERE/frontier/$1/t$temperature-p$top_p
            score "$point.json" "$OUT/$1" "$start" --temperature "$temperature" --top-p "$top_p" \
                --limit "${FRONTIER_LIMIT:-1000}"
        done
    done
}

chosen=$OUT/validation/frontier # temperatures are chosen on the validation split, whichever is evaluated

best() { # the supervised model at the temperature that is best for METEOR, and at that for the second judge
    local metric temperature
    for metric in meteor intent_second_judge; do
        temperature=$(python reproduce/frontier.py "$chosen/sft" --best "$metric")
        supervised "$HERE/replies/best-$metric.jsonl" --temperature "$temperature"
    done
}

match() { # NAME: at the temperature where distinct-2 is that of the supervised model
    local temperature
    temperature=$(python reproduce/frontier.py "$chosen/$1" --like "$chosen/sft")
    score "$HERE/eval/$1-matched.json" "$OUT/$1" "$start" --temperature "$temperature" \
        --replies "$HERE/replies/$1-matched.jsonl"
}

over_best() { # NAME: against the supervised model at its best
    local metric
    for metric in meteor intent_second_judge; do
        score "$HERE/eval/$1-over-best-$metric.json" "$HERE/replies/$1.jsonl" "$HERE/replies/best-$metric.jsonl"
    done
}

data=(--data-path "$DATA" --skip-bad-rows --mixed-precision "$precision")
judge+=(${more_judge[@]+"${more_judge[@]}"}) sft+=(${more_sft[@]+"${more_sft[@]}"}) pairs+=(${more_pairs[@]+"${more_pairs[@]}"})
stage judge whole "$OUT/judge" python intent_classifier.py --model-path "$ENCODER" --half even "${data[@]}" "${judge[@]}"
stage second_judge whole "$OUT/second_judge" \
    python intent_classifier.py --model-path "$ENCODER" --half odd --seed 1 "${data[@]}" "${judge[@]}"
stage sft whole "$OUT/sft" python sft_dialog.py --model-path "$POLICY" --template dialogue --loss-on dialogue --batch-size 16 \
    --lr 2e-4 --warmup-steps 20 --eval-every 200 "${data[@]}" "${sft[@]}"
stage reward_model whole "$OUT/reward_model" \
    python reward_model.py --model-path "$ENCODER" --from-dialogues "$OUT/sft" "${data[@]}" "${pairs[@]}"
measure eval-sft evaluate sft
measure_frontier sft
measure best-sft best
for name in "${policies[@]}"; do
    choose_estimator "${name%-*}"
    stage "$name" train "$name" --seed "${name##*-}" ${estimator[@]+"${estimator[@]}"}
done
choose_estimator "${kinds[0]}" # the ablations are of the main one
stage no-kl train no-kl --kl-coef 0 ${estimator[@]+"${estimator[@]}"}
stage no-meteor train no-meteor --meteor-coef 0 --consensus-coef 0 ${estimator[@]+"${estimator[@]}"}
for name in "${policies[@]}" no-kl no-meteor; do measure "eval-$name" evaluate "$name"; done
for name in "${policies[@]}"; do
    measure_frontier "$name"
    measure "matched-$name" match "$name"
    measure "over-best-$name" over_best "$name"
done
if [[ ${#only[@]} -gt 0 ]]; then exit; fi
read -ra seeds <<<"$SEEDS"
python reproduce/results.py "$OUT" --split "$SPLIT" --results "$RESULTS" --main "${kinds[0]}" --seeds "${seeds[@]}"
