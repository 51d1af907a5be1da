#!/usr/bin/env bash
# The whole recipe. What is finished is skipped: after a stop, the same command goes on.
#
#   bash run_all.sh           the embedded world: two CPU cores, no download, minutes
#   bash run_all.sh qwen3     the paper's settings: Qwen3-1.7B, teacher 8B (or TEACHER=Qwen/Qwen3-14B)
#   bash run_all.sh llama     the paper's settings: Llama-3.1-8B-Instruct, teacher Llama-3.3-70B-Instruct
#
# SEED=1 (or any number) draws another world, or other samples, in a folder of its own.
set -euo pipefail
cd "$(dirname "$0")"
setting=${1:-world} SEED=${SEED:-0}

# Flags by purpose: D data, G GRPO, B the bridge and what is compared with it, E evaluation. Inside a
# comparison all is equal but the thing compared; OPD alone or SFT take as many updates as the bridge.
case $setting in
world)
    teacher=base-teacher student=base-student runs=runs/world
    [ "$SEED" = 0 ] || runs=runs/world-seed$SEED
    sets=$runs/test.jsonl short=(--max-new-tokens 48 --seed "$SEED")
    D=(--data $runs/train.jsonl --exclude $sets,$runs/valid.jsonl --show-every 20 "${short[@]}")
    G=(--prompts 32 --mini-batch 32 --kl-coef 0)
    G_teacher=(--lr 3e-4 --steps 40) G_student=(--lr 5e-4 --steps 80)
    B=(--prompts 16 --rollouts 4 --lr 1e-3) warmup=(--steps 40) opd=(--steps 80) both=(--steps 120)
    E=("${short[@]}")
    export OMP_NUM_THREADS=1 ;; # models this small run two at a time, a core each
qwen3 | llama)
    case $setting in
    qwen3) teacher=${TEACHER:-Qwen/Qwen3-8B} student=Qwen/Qwen3-1.7B ;;
    llama) teacher=${TEACHER:-meta-llama/Llama-3.3-70B-Instruct}
           student=meta-llama/Llama-3.1-8B-Instruct ;;
    esac
    runs=runs/$(basename "$teacher" | tr '[:upper:]' '[:lower:]')
    [ "$SEED" = 0 ] || runs=$runs-seed$SEED
    sets=math500,aime24,aime25 D=(--seed "$SEED" --gradient-checkpointing) E=(--seed "$SEED")
    G=() G_teacher=() G_student=() B=() warmup=() opd=() both=(--epochs 2) ;; # Tables 9, 10: defaults
*)
    echo "usage: bash run_all.sh [world | qwen3 | llama]" >&2
    exit 2 ;;
esac
mkdir -p $runs/logs

at() { # a run's folder, or a hub name as it is
    case $1 in */*) echo "$1" ;; *) echo "$runs/$1" ;; esac
}
run() { # run NAME SCRIPT FLAGS...: one stage, unless it is finished
    local name=$1 script=$2 && shift 2
    if grep -qs '"finished": true' $runs/$name/config.json; then return; fi
    echo "--- $name"
    python "$script" "$@" --out $runs/$name
}
report() { # report NAME [MODEL]: evaluate, then show the table as it has grown
    if ! grep -qs '"finished": true' $runs/$1/eval/config.json; then
        python evaluate.py --model "$(at "${2:-$1}")" --data $sets "${E[@]}" --out $runs/$1/eval \
            --table $runs
    fi
}
grpo() { # grpo NAME MODEL FLAGS...
    local name=$1 model=$2 && shift 2
    run $name grpo.py --model "$(at $model)" "${D[@]}" "${G[@]}" "$@"
}
distil() { # distil SCRIPT NAME TEACHER STUDENT FLAGS...
    local script=$1 name=$2 && shift 2
    local cache=() # one file of each teacher's rollouts, for all that learn from them
    if [ $setting != world ] && [ $script = fkl_warmup.py ]; then
        cache=(--cache $runs/rollouts/$(basename $1).jsonl)
    fi
    run $name $script --teacher "$(at $1)" --student "$(at $2)" "${D[@]}" "${B[@]}" "${cache[@]}" \
        "${@:3}"
}
bridge() { # bridge NAME TEACHER HALF: forward-KL warmup, then OPD, into the base student
    distil fkl_warmup.py $1-warmup $2 $student "${warmup[@]}" --half $3
    distil opd.py $1 $2 $1-warmup "${opd[@]}" --half $3
    report $1
}

job=
beside() { # beside JOB MAIN: in the world JOB has the second core, and a log; else one after the other
    if [ $setting != world ]; then $1; $2; return; fi
    echo "=== $2; beside it $1, in $runs/logs/$1.txt"
    (set -e; $1) > $runs/logs/$1.txt 2>&1 & job=$!
    $2
    wait $job || { echo "$1 failed: $(tail -n 1 $runs/logs/$1.txt)" >&2; exit 1; }
    job=
}
trap '[ -z "$job" ] || kill $job $(pgrep -P $job) 2> /dev/null' EXIT

# --- Stage 1, and the baseline. The world trains its base models itself, on documents (plain SFT).
P=(--targets data --prompts 64 --rollouts 1 --lr-schedule linear --warmup-steps 50
   --weight-decay 0.01 --adam-beta2 0.99 --seed "$SEED" --show-every 100)
teacher_rl() {
    [ $setting != world ] || run base-teacher fkl_warmup.py --student $runs/init-teacher \
        --data $runs/corpus-teacher.jsonl --lr 4e-3 --steps 600 "${P[@]}"
    report base-teacher $teacher
    grpo teacher-rl-1h $teacher "${G_teacher[@]}" --half 1
    report teacher-rl-1h
}
cold_grpo() { # R1
    [ $setting != world ] || run base-student fkl_warmup.py --student $runs/init-student \
        --data $runs/corpus-student.jsonl --lr 6e-3 --steps 420 "${P[@]}"
    report base-student $student
    grpo cold-grpo $student "${G_student[@]}"
    report cold-grpo
}
[ $setting != world ] || python tests/world.py --out $runs --seed "$SEED"
beside cold_grpo teacher_rl

# --- R5-half: the bridge on the teacher's half of the labels, then GRPO on the other half.
#     Beside it the teacher on all labels, and the bridge from the teacher without RL.
bridge_then_fresh_labels() {
    bridge bridge-1h teacher-rl-1h 1
    grpo fresh-2h bridge-1h "${G_student[@]}" --half 2
    report fresh-2h
}
full_and_raw_teacher() {
    grpo teacher-rl $teacher "${G_teacher[@]}"
    report teacher-rl
    bridge raw-bridge $teacher all
}
beside full_and_raw_teacher bridge_then_fresh_labels

# --- R3-full: all labels to the teacher. R7 replay: stage 3 on labels that the teacher has used.
#     Beside them, from the same teacher, OPD without warmup (R8) and SFT on its samples (R2).
full_bridge_and_replay() {
    bridge bridge teacher-rl all
    grpo replay-1h bridge-1h "${G_student[@]}" --half 1
    report replay-1h
}
no_bridge() {
    distil opd.py opd-only teacher-rl $student "${both[@]}"
    report opd-only
    distil fkl_warmup.py sft teacher-rl $student "${both[@]}" --targets hard
    report sft
}
beside no_bridge full_bridge_and_replay

# --- At the paper's scale also: R2 and R8 on half the labels and then fresh ones, the SFT'd teacher
#     (R6; ours: on its own correct responses), and the RL'd teacher of the student's size.
if [ $setting != world ]; then
    distil fkl_warmup.py sft-1h teacher-rl-1h $student "${both[@]}" --targets hard --half 1
    grpo sft-fresh-2h sft-1h "${G_student[@]}" --half 2
    distil opd.py opd-only-1h teacher-rl-1h $student "${both[@]}" --half 1
    grpo opd-only-fresh-2h opd-only-1h "${G_student[@]}" --half 2
    distil fkl_warmup.py sft-teacher $teacher $teacher --targets hard --only-correct
    bridge sft-teacher-bridge sft-teacher all
    distil fkl_warmup.py sft-teacher-1h $teacher $teacher --targets hard --only-correct --half 1
    bridge sft-teacher-bridge-1h sft-teacher-1h 1
    grpo sft-teacher-fresh-2h sft-teacher-bridge-1h "${G_student[@]}" --half 2
    grpo sft-teacher-replay-1h sft-teacher-bridge-1h "${G_student[@]}" --half 1
    bridge same-size-bridge cold-grpo all
    for name in sft-1h sft-fresh-2h opd-only-1h opd-only-fresh-2h sft-teacher sft-teacher-1h \
        sft-teacher-fresh-2h sft-teacher-replay-1h; do report $name; done
fi
echo "=== done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
python evaluate.py --table $runs
