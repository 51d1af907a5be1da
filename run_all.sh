#!/usr/bin/env bash
# The whole recipe. What is finished is skipped: after a stop, the same command goes on.
#   bash run_all.sh               the embedded world: two CPU cores, no download, minutes
#   bash run_all.sh world-full    all routes, label budgets and reward densities on the world
#   bash run_all.sh world-gpu     a world of longer chains and larger models, for one GPU
#   bash run_all.sh qwen3         the paper's settings: Qwen3-1.7B, teacher 8B (or TEACHER=...-14B)
#   bash run_all.sh llama         the paper's settings: Llama-3.1-8B-Instruct, teacher 70B
# SEED=1 (or any number) draws another world, or other samples, in a folder of its own;
# SEEDS="0 1 2" bash run_all.sh world-full takes several, JOBS=2 at a time, and compares them.
set -euo pipefail
cd "$(dirname "$0")"
setting=${1:-world} SEED=${SEED:-0}

folder() { if [ $2 = 0 ]; then echo runs/$1; else echo runs/$1-seed$2; fi; } # NAME SEED
if [ $setting = world-full ] && [ -n "${SEEDS:-}" ]; then # several worlds, each with a log
    mkdir -p runs/logs
    printf '%s\n' $SEEDS | SEEDS= xargs -P "${JOBS:-2}" -I{} bash -c '
        echo "=== world of seed {}, in runs/logs/seed{}.txt"
        SEED={} bash run_all.sh world-full > runs/logs/seed{}.txt 2>&1 ||
            { echo "seed {} failed: see runs/logs/seed{}.txt" >&2; exit 1; }'
    python tests/lab/evidence.py $(for seed in $SEEDS; do folder world $seed; done)
    exit
fi

# Flags. In a comparison all is equal but the thing compared: OPD alone and SFT take as many updates
# as the bridge (both), and the SFT'd teacher as many, on as many rows, as the RL'd one.
case $setting in
world | world-full)
    scale=small length=48 prompts=32 distil="--prompts 16 --rollouts 4 --lr 1e-3"
    rl_teacher="--lr 3e-4 --steps 40" rl_student="--lr 5e-4 --steps 80"
    warmup="--steps 40" opd="--steps 80" both="--steps 120" base="--prompts 64 --warmup-steps 50"
    base_teacher="--lr 4e-3 --steps 600" base_student="--lr 6e-3 --steps 1200"
    export OMP_NUM_THREADS=1 ;; # models this small run two at a time, a core each
world-gpu)
    scale=large length=96 prompts=64 distil="--prompts 32 --rollouts 8 --lr 2e-4"
    rl_teacher="--lr 5e-5 --steps 80" rl_student="--lr 1e-4 --steps 160"
    warmup="--steps 80" opd="--steps 160" both="--steps 240" base="--prompts 256 --warmup-steps 200"
    base_teacher="--lr 5e-4 --steps 3000" base_student="--lr 1e-3 --steps 3000" ;;
qwen3) teacher=${TEACHER:-Qwen/Qwen3-8B} student=Qwen/Qwen3-1.7B ;;
llama) teacher=meta-llama/Llama-3.3-70B-Instruct student=meta-llama/Llama-3.1-8B-Instruct ;;
*) echo "usage: bash run_all.sh [world | world-full | world-gpu | qwen3 | llama]" >&2; exit 2 ;;
esac
if [[ $setting = world* ]]; then
    runs=$(folder ${setting%-full} $SEED) teacher=base-teacher student=base-student cache=
    sets=$runs/test.jsonl,$runs/hard.jsonl sampling="--max-new-tokens $length --seed $SEED"
    rl="--prompts $prompts --mini-batch $prompts --kl-coef 0"
    sft_teacher="--prompts $prompts --rollouts 8 $rl_teacher --targets hard --only-correct"
    data="--data $runs/train.jsonl --exclude $sets,$runs/valid.jsonl $sampling
          --lr-schedule linear --show-every 20"
    python tests/world.py --out $runs --seed $SEED --scale $scale
    mkdir -p $runs/logs
else # Tables 9 and 10 are the scripts' defaults
    runs=$(folder $(basename $teacher | tr '[:upper:]' '[:lower:]') $SEED) cache=$runs/rollouts
    sets=math500,aime24,aime25 sampling="--seed $SEED" data="--seed $SEED --gradient-checkpointing"
    rl= rl_teacher= rl_student= distil= warmup= opd= both="--epochs 2"
    sft_teacher="--epochs 10 --targets hard --only-correct"
fi

# A stage has a name, models (such names, or hub names with a /) and flags; it is also evaluated.
at() { case $1 in */*) echo $1 ;; *) echo $runs/$1 ;; esac; }
finished() { grep -qs '"finished": true' $runs/$1/config.json; }
run() { # NAME SCRIPT FLAGS...
    finished $1 || { echo "--- $1"; python ${@:2} --out $runs/$1; }
    [[ $1 = *-warmup ]] || report $1 $1
}
report() { # NAME MODEL: evaluate, then show the table as it has grown
    finished $1/eval || python evaluate.py --model $(at $2) --data $sets $sampling \
        --out $runs/$1/eval --table $runs
}
base() { # SIZE MODEL FLAGS...: the world trains its base models, on documents (plain SFT)
    [[ $setting = world* ]] || { report base-$1 $2; return; }
    run base-$1 fkl_warmup.py --targets data --rollouts 1 --student $runs/init-$1 \
        --data $runs/corpus-$1.jsonl $base ${@:3} --lr-schedule linear --weight-decay 0.01 \
        --adam-beta2 0.99 --seed $SEED --show-every 100
}
grpo() { run $1 grpo.py --model $(at $2) $data $rl ${@:3}; }
distil() { run $1 $2 --teacher $(at $3) --student $(at $4) $data $distil ${@:5}; }
learn() { distil $1 fkl_warmup.py $2 $3 ${cache:+--cache $cache/$(basename $2).jsonl} ${@:4}; }
bridge() { # forward-KL warmup, then OPD, into the base student
    learn $1-warmup $2 $student $warmup ${@:3}
    distil $1 opd.py $2 $1-warmup $opd ${@:3}
}

base_teacher() { base teacher $teacher ${base_teacher:-}; }
base_student() { base student $student ${base_student:-}; }
teachers() { # stage 1
    grpo teacher-rl-1h $teacher $rl_teacher --half 1
    grpo teacher-rl $teacher $rl_teacher
}
baselines() {
    grpo cold-grpo $student $rl_student # R1
    bridge raw-bridge $teacher # the bridge from the teacher without RL
}
all_labels() {
    bridge bridge teacher-rl # R3-full: all labels to the teacher
    distil opd-only opd.py teacher-rl $student $both # R8: no warmup
    learn sft teacher-rl $student $both --targets hard # R2: the teacher's samples as hard labels
}
half_labels() {
    bridge bridge-1h teacher-rl-1h --half 1
    grpo fresh-2h bridge-1h $rl_student --half 2 # R5-half: labels that the teacher never saw
    grpo replay-1h bridge-1h $rl_student --half 1 # R7: the teacher's labels again
}
others() { # R2 and R8 on half the labels, then fresh ones; the SFT'd teacher (R6); R1 as a teacher
    learn sft-1h teacher-rl-1h $student $both --targets hard --half 1
    grpo sft-fresh-2h sft-1h $rl_student --half 2
    distil opd-only-1h opd.py teacher-rl-1h $student $both --half 1
    grpo opd-only-fresh-2h opd-only-1h $rl_student --half 2
    learn sft-teacher $teacher $teacher $sft_teacher # on its own correct responses (ours)
    bridge sft-teacher-bridge sft-teacher
    learn sft-teacher-1h $teacher $teacher $sft_teacher --half 1
    bridge sft-teacher-bridge-1h sft-teacher-1h --half 1
    grpo sft-teacher-fresh-2h sft-teacher-bridge-1h $rl_student --half 2
    grpo sft-teacher-replay-1h sft-teacher-bridge-1h $rl_student --half 1
    bridge same-size-bridge cold-grpo
}
beyond() { # beyond the paper: fewer labels and more; rewards between dense and sparse (Eq. 3)
    for n in 32 64 256 512; do # 128 are the routes above
        grpo teacher-rl-$n $teacher $rl_teacher --data $runs/train-$n.jsonl
        bridge bridge-$n teacher-rl-$n --data $runs/train-$n.jsonl
        grpo cold-grpo-$n $student $rl_student --data $runs/train-$n.jsonl
    done
    for weight in 0.25 0.5 0.75 1; do # 0 is the bridge
        distil lambda-$weight opd.py teacher-rl bridge-warmup $opd --sparse-weight $weight
    done
}
side_by_side() { # A B: two routes at once, B with a log; a stop reaches all that they run
    set -m # makes each of them a process group
    trap 'kill -- -$first -$second 2> /dev/null || true; wait; exit 130' INT TERM
    echo "=== $1; beside it $2, in $runs/logs/$2.txt"
    $1 & first=$!
    $2 > $runs/logs/$2.txt 2>&1 & second=$!
    wait $first || { wait; echo "$1 failed: see above" >&2; exit 1; }
    wait $second || { echo "$2 failed: see $runs/logs/$2.txt" >&2; exit 1; }
}
if [ $setting = world ]; then
    side_by_side base_teacher base_student
    side_by_side teachers baselines
    side_by_side all_labels half_labels
else
    base_teacher; base_student; teachers; baselines; all_labels; half_labels
    [ $setting = world-gpu ] || others
    [ $setting != world-full ] || beyond
fi
echo "=== done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
python evaluate.py --table $runs
