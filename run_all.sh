#!/usr/bin/env bash
# The whole recipe. What the same command has finished is skipped: after a stop, give it again.
#   bash run_all.sh               the embedded world: two CPU cores, no download, minutes
#   bash run_all.sh world-full    all routes, label budgets and reward densities on the world
#   bash run_all.sh world-gpu     a world of longer chains and larger models, for one GPU
#   bash run_all.sh tiny          SmolLM2-135M, teacher 360M, on GSM8K: a GPU of 16 GB, hours
#   bash run_all.sh small         Qwen3-0.6B, teacher 1.7B, on DAPO: a GPU of 80 GB, about a day
#   bash run_all.sh qwen3         the paper's: Qwen3-1.7B, teacher 8B (or TEACHER=...-14B); llama
# SEED=1 (or any number) draws another world, or other samples, in a folder of its own;
# SEEDS="0 1 2" bash run_all.sh world-full takes several, JOBS=2 at a time, and compares them.
# From tiny on, TEACHER, STUDENT, DATA, SETS (to evaluate on) and RUNS (the folder) replace what is
# below. In all settings FLAGS are added to every stage, EVAL_FLAGS to every evaluation.
set -euo pipefail; cd "$(dirname "$0")"
setting=${1:-world} SEED=${SEED:-0}

folder() { if [ $2 = 0 ]; then echo runs/$1; else echo runs/$1-seed$2; fi; } # NAME SEED
if [ -n "${SEEDS:-}" ]; then # several worlds, each with a log
    [ "$setting" = world-full ] || { echo "SEEDS is for world-full" >&2; exit 2; }
    mkdir -p runs/logs; printf '%s\n' $SEEDS | SEEDS= xargs -P "${JOBS:-2}" -I{} bash -c '
        echo "=== world of seed {}, in runs/logs/seed{}.txt"
        SEED={} bash run_all.sh world-full > runs/logs/seed{}.txt 2>&1 ||
            { echo "seed {} failed: see runs/logs/seed{}.txt" >&2; exit 1; }'
    python tests/lab/evidence.py $(for seed in $SEEDS; do folder world $seed; done); exit
fi

# Flags. In a comparison all is equal but the thing compared: SFT has as many updates as the bridge,
# the SFT'd teacher as many epochs as the RL'd one (in the world as many updates on about as many
# rows: a quarter of its 32 samples a prompt is correct). What stays empty is as in Tables 9 and 10.
data=dapo sets=math500,aime24,aime25 limits=--gradient-checkpointing both="--epochs 2" scoring=
sft_teacher="--epochs 10" name= cache= length= warmup= opd= rl= rl_teacher= rl_student= distil=
case $setting in
world | world-full) # models this small run two at a time, a core each
    scale=small length="--max-new-tokens 48" prompts=32 warmup=40 opd=80; export OMP_NUM_THREADS=1
    rl_teacher="--lr 3e-4 --steps 40" rl_student="--lr 5e-4 --steps 80"
    distil="--prompts 16 --rollouts 4 --lr 1e-3" base="--prompts 64 --warmup-steps 50"
    base_teacher="--lr 4e-3 --steps 600" base_student="--lr 6e-3 --steps 1200" ;;
world-gpu)
    scale=large length="--max-new-tokens 96" prompts=64 warmup=80 opd=160
    rl_teacher="--lr 5e-5 --steps 80" rl_student="--lr 1e-4 --steps 160"
    distil="--prompts 32 --rollouts 8 --lr 2e-4" base="--prompts 256 --warmup-steps 200"
    base_teacher="--lr 5e-4 --steps 3000" base_student="--lr 1e-3 --steps 3000" ;;
tiny) # groups of 16, as few are right; no reference, to save memory; rates and updates are guesses
    teacher=HuggingFaceTB/SmolLM2-360M-Instruct student=HuggingFaceTB/SmolLM2-135M-Instruct
    data=openai/gsm8k:main:train sets=openai/gsm8k:main:test length="--max-new-tokens 512"
    limits+=" --labels 1000 --micro-tokens 4096" rl="--prompts 16 --rollouts 16 --kl-coef 0"
    rl_teacher="--lr 5e-6 --steps 200" rl_student="--lr 1e-5 --steps 200" name=tiny
    distil="--prompts 32 --rollouts 4 --lr 2e-5" warmup=50 opd=100 scoring="--limit 500" ;;
small) # 4 updates a step, of 8 prompts as in Table 9; few of them, so higher rates: guesses, too
    teacher=Qwen/Qwen3-1.7B student=Qwen/Qwen3-0.6B sets=math500,aime24 name=small
    limits+=" --labels 1000" rl="--prompts 32 --lr 2e-6 --steps 100"
    distil="--prompts 32 --rollouts 4 --lr 1e-5" warmup=50 opd=100 length="--max-new-tokens 2048" ;;
qwen3) teacher=Qwen/Qwen3-8B student=Qwen/Qwen3-1.7B ;;
llama) teacher=meta-llama/Llama-3.3-70B-Instruct student=meta-llama/Llama-3.1-8B-Instruct ;;
*) echo "usage: bash run_all.sh [world|world-full|world-gpu|tiny|small|qwen3|llama]" >&2; exit 2 ;;
esac
[ -z "$opd" ] || both="--steps $((warmup + opd))" warmup="--steps $warmup" opd="--steps $opd"
if [[ $setting = world* ]]; then
    runs=$(folder ${setting%-full} $SEED) teacher=base-teacher student=base-student
    sets=$runs/test.jsonl,$runs/hard.jsonl rl="--prompts $prompts --mini-batch $prompts --kl-coef 0"
    sft_teacher="--prompts $prompts --rollouts 32 $rl_teacher" data="--data $runs/train.jsonl
        --exclude $sets,$runs/valid.jsonl --seed $SEED $length --lr-schedule linear --show-every 20"
    python tests/world.py --out $runs --seed $SEED --scale $scale; mkdir -p $runs/logs
else
    teacher=${TEACHER:-$teacher} student=${STUDENT:-$student} sets=${SETS:-$sets}
    runs=${RUNS:-$(folder ${name:-$(basename $teacher | tr '[:upper:]' '[:lower:]')} $SEED)}
    cache=$runs/rollouts data="--data ${DATA:-$data} --exclude $sets $limits --seed $SEED $length"
fi

# A stage has a name, models (such names, or hub names with a /) and flags; it is also evaluated.
at() { case $1 in */*) echo $1 ;; *) echo $runs/$1 ;; esac; }
once() { # NAME COMMAND...: unless just this has finished there; the script judges anything else
    local made=$runs/$1/config.json line="${*:2} --out $runs/$1"
    grep -qs '"finished": true' $made && grep -qF "\"command\": \"$line\"" $made && return
    echo "--- $1"; python $line
}
run() { once $1 ${@:2} ${FLAGS:-}; [[ $1 = *-warmup ]] || report $1 $1; } # NAME SCRIPT FLAGS...
report() { # NAME MODEL: evaluate, then show the table as it has grown
    once $1/eval evaluate.py --model $(at $2) --data $sets --seed $SEED $length $scoring \
        ${EVAL_FLAGS:-} --table $runs; }
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
teachers() { grpo teacher-rl-1h $teacher $rl_teacher --half 1 # stage 1
    grpo teacher-rl $teacher $rl_teacher; }
baselines() { grpo cold-grpo $student $rl_student # R1
    bridge raw-bridge $teacher; } # the bridge from the teacher without RL
all_labels() {
    bridge bridge teacher-rl # R3-full: all labels to the teacher
    distil opd-only opd.py teacher-rl $student $opd # R8: no warmup; ours: the bridge's OPD stage
    learn sft teacher-rl $student $both --targets hard # R2: the teacher's samples as hard labels
}
half_labels() {
    bridge bridge-1h teacher-rl-1h --half 1
    grpo fresh-2h bridge-1h $rl_student --half 2 # R5-half: labels that the teacher never saw
    grpo replay-1h bridge-1h $rl_student --half 1 # R7: the teacher's labels again
}
others() { # R2 and R8 on half the labels, then fresh ones; the SFT'd teacher (R6); R1 as a teacher
    distil opd-only-long opd.py teacher-rl $student $both # R8; ours: the bridge's updates in all
    learn sft-1h teacher-rl-1h $student $both --targets hard --half 1
    grpo sft-fresh-2h sft-1h $rl_student --half 2
    distil opd-only-1h opd.py teacher-rl-1h $student $opd --half 1
    grpo opd-only-fresh-2h opd-only-1h $rl_student --half 2
    learn sft-teacher $teacher $teacher $sft_teacher --targets hard --only-correct # ours
    bridge sft-teacher-bridge sft-teacher
    learn sft-teacher-1h $teacher $teacher $sft_teacher --targets hard --only-correct --half 1
    bridge sft-teacher-bridge-1h sft-teacher-1h --half 1
    grpo sft-teacher-fresh-2h sft-teacher-bridge-1h $rl_student --half 2
    grpo sft-teacher-replay-1h sft-teacher-bridge-1h $rl_student --half 1
    bridge same-size-bridge cold-grpo
}
beyond() { # not in the paper: other numbers of labels than 128; between OPD and reward (Eq. 3)
    for n in 32 64 256 512; do some="--labels $n"; ((n < 128)) || some+=" --data $runs/pool.jsonl"
        grpo teacher-rl-$n $teacher $rl_teacher $some
        bridge bridge-$n teacher-rl-$n $some
        grpo cold-grpo-$n $student $rl_student $some
    done
    grpo cold-grpo-2h $student $rl_student --half 2 # as fresh-2h, without the bridge
    for x in 0.25 0.5 0.75 1; do # 0 is the bridge
        distil lambda-$x opd.py teacher-rl bridge-warmup $opd --sparse-weight $x; done
}
side_by_side() { # A B: two at once, each a process group, B with a log; a stop reaches them
    set -m; trap 'kill -- -$first -$second 2> /dev/null || true; wait; exit 130' INT TERM
    echo "=== $1; beside it $2, in $runs/logs/$2.txt"
    $1 & first=$!; $2 > $runs/logs/$2.txt 2>&1 & second=$!
    wait $first || { wait; echo "$1 failed: see above" >&2; exit 1; }
    wait $second || { echo "$2 failed: see $runs/logs/$2.txt" >&2; exit 1; }
}
if [ $setting = world ]; then
    side_by_side base_teacher base_student
    side_by_side teachers baselines
    side_by_side all_labels half_labels
else
    base_teacher; base_student; teachers; baselines; all_labels; half_labels
    case $setting in qwen3 | llama) others ;; world-full) others; beyond ;; esac
fi
echo "=== done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
python evaluate.py --table $runs
