#!/usr/bin/env bash
# The whole recipe. What is finished is skipped: after a stop, the same command goes on.
#
#   bash run_all.sh               the embedded world: two CPU cores, no download, minutes
#   bash run_all.sh world-full    all routes, label budgets and reward densities on the world
#   bash run_all.sh world-gpu     a world of longer chains and larger models, for one GPU
#   bash run_all.sh qwen3         the paper's settings: Qwen3-1.7B, teacher 8B (or TEACHER=...-14B)
#   bash run_all.sh llama         the paper's settings: Llama-3.1-8B-Instruct, teacher 70B
#
# SEED=1 (or any number) draws another world, or other samples, in a folder of its own;
# SEEDS="0 1 2" bash run_all.sh world-full takes several, JOBS=2 at a time, and compares them.
set -euo pipefail
cd "$(dirname "$0")"
setting=${1:-world} SEED=${SEED:-0}

folder() { # folder NAME SEED
    if [ "$2" = 0 ]; then echo runs/$1; else echo runs/$1-seed$2; fi
}
if [ "$setting" = world-full ] && [ -n "${SEEDS:-}" ]; then # whole worlds side by side
    printf '%s\n' $SEEDS | SEEDS= xargs -P "${JOBS:-2}" -I{} env SEED={} bash run_all.sh world-full
    python evaluate.py --table "$(for s in $SEEDS; do folder world $s; done | paste -sd,)"
    exit
fi

# Flags by purpose: P the world's base models, D data, G GRPO, B the bridge and what is compared
# with it, T the SFT'd teacher, E evaluation. Inside a comparison all is equal but the thing
# compared: OPD alone or SFT take as many updates as the bridge, and the SFT'd teacher as many, on
# as many rows, as the RL'd one.
case $setting in
world | world-full | world-gpu)
    teacher=base-teacher student=base-student runs=$(folder ${setting%-full} "$SEED")
    if [ $setting = world-gpu ]; then
        scale=large length=96
        G_teacher=(--lr 5e-5 --steps 80) G_student=(--lr 1e-4 --steps 160) prompts=64
        B=(--prompts 32 --rollouts 8 --lr 2e-4)
        warmup=(--steps 80) opd=(--steps 160) both=(--steps 240)
        P=(--prompts 256 --steps 3000 --warmup-steps 200)
        P_teacher=(--lr 5e-4) P_student=(--lr 1e-3)
    else
        scale=small length=48
        G_teacher=(--lr 3e-4 --steps 40) G_student=(--lr 5e-4 --steps 80) prompts=32
        B=(--prompts 16 --rollouts 4 --lr 1e-3)
        warmup=(--steps 40) opd=(--steps 80) both=(--steps 120)
        P=(--prompts 64 --warmup-steps 50)
        P_teacher=(--lr 4e-3 --steps 600) P_student=(--lr 6e-3 --steps 1200)
        export OMP_NUM_THREADS=1 # models this small run two at a time, a core each
    fi
    sets=$runs/test.jsonl,$runs/hard.jsonl E=(--max-new-tokens $length --seed "$SEED")
    D=(--data $runs/train.jsonl --exclude $sets,$runs/valid.jsonl --lr-schedule linear
       --show-every 20 "${E[@]}")
    G=(--prompts $prompts --mini-batch $prompts --kl-coef 0)
    T=(--prompts $prompts --rollouts 8 "${G_teacher[@]}") ;;
qwen3 | llama)
    case $setting in
    qwen3) teacher=${TEACHER:-Qwen/Qwen3-8B} student=Qwen/Qwen3-1.7B ;;
    llama) teacher=${TEACHER:-meta-llama/Llama-3.3-70B-Instruct}
           student=meta-llama/Llama-3.1-8B-Instruct ;;
    esac
    runs=$(folder "$(basename "$teacher" | tr '[:upper:]' '[:lower:]')" "$SEED")
    # Tables 9 and 10 are the scripts' defaults
    sets=math500,aime24,aime25 D=(--seed "$SEED" --gradient-checkpointing) E=(--seed "$SEED")
    G=() G_teacher=() G_student=() B=() warmup=() opd=() both=(--epochs 2) T=(--epochs 10) ;;
*)
    echo "usage: bash run_all.sh [world | world-full | world-gpu | qwen3 | llama]" >&2
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
    report $name
}
distil() { # distil SCRIPT NAME TEACHER STUDENT FLAGS...
    local script=$1 name=$2 && shift 2
    local cache=() # one file of each teacher's rollouts, for all that learn from them
    if [[ $setting != world* ]] && [ $script = fkl_warmup.py ]; then
        cache=(--cache $runs/rollouts/$(basename $1).jsonl)
    fi
    run $name $script --teacher "$(at $1)" --student "$(at $2)" "${D[@]}" "${B[@]}" "${cache[@]}" \
        "${@:3}"
}
bridge() { # bridge NAME TEACHER FLAGS...: forward-KL warmup, then OPD, into the base student
    distil fkl_warmup.py $1-warmup $2 $student "${warmup[@]}" "${@:3}"
    distil opd.py $1 $2 $1-warmup "${opd[@]}" "${@:3}"
    report $1
}
opd_only() { # opd_only NAME TEACHER FLAGS...: R8, without the warmup
    distil opd.py $1 $2 $student "${both[@]}" "${@:3}"
    report $1
}
sft() { # sft NAME TEACHER FLAGS...: R2, on the teacher's samples as hard labels
    distil fkl_warmup.py $1 $2 $student "${both[@]}" --targets hard "${@:3}"
    report $1
}
sft_teacher() { # sft_teacher NAME FLAGS...: on its own correct responses (ours)
    distil fkl_warmup.py $1 $teacher $teacher "${T[@]}" --targets hard --only-correct "${@:2}"
    report $1
}

ready() { # ready NAME: where the other line of work makes it, wait until that has finished it
    [ -n "$lines" ] || return 0
    until grep -qs '"finished": true' $runs/$1/config.json; do
        [ -z "$job" ] || kill -0 $job 2> /dev/null || return 0 # it will say why
        sleep 0.2
    done
}

# The world draws its problems, and trains its base models itself, on documents (plain SFT).
make_world() { python tests/world.py --out $runs --seed "$SEED" --scale $scale; }
base_model() { # base_model SIZE FLAGS...
    run base-$1 fkl_warmup.py --targets data --rollouts 1 \
        --student $runs/init-$1 --data $runs/corpus-$1.jsonl "${P[@]}" "${@:2}" \
        --lr-schedule linear --weight-decay 0.01 --adam-beta2 0.99 --seed "$SEED" --show-every 100
}
base_teacher() { [[ $setting != world* ]] || base_model teacher "${P_teacher[@]}"; }
base_student() { [[ $setting != world* ]] || base_model student "${P_student[@]}"; }

# --- One line of work has stage 1 and what is taught by the teacher that has seen all labels.
teachers() {
    base_teacher
    grpo teacher-rl-1h $teacher "${G_teacher[@]}" --half 1
    grpo teacher-rl $teacher "${G_teacher[@]}"
    ready base-student
    bridge bridge teacher-rl # R3-full: all labels to the teacher
    opd_only opd-only teacher-rl
    sft sft teacher-rl
}
# --- The other has the baseline, and the bridge on one half of the labels with what follows it.
students() {
    base_student
    report base-student $student
    grpo cold-grpo $student "${G_student[@]}" # R1
    ready base-teacher
    report base-teacher $teacher
    ready teacher-rl-1h
    bridge bridge-1h teacher-rl-1h --half 1
    grpo fresh-2h bridge-1h "${G_student[@]}" --half 2 # R5-half: labels that the teacher never saw
    grpo replay-1h bridge-1h "${G_student[@]}" --half 1 # R7: the teacher's labels again
    bridge raw-bridge $teacher # the bridge from the teacher without RL
}
# --- The other routes: R2 and R8 on half the labels and then fresh ones, the SFT'd teacher
#     (R6), and the RL'd teacher of the student's size.
others() {
    sft sft-1h teacher-rl-1h --half 1
    grpo sft-fresh-2h sft-1h "${G_student[@]}" --half 2
    opd_only opd-only-1h teacher-rl-1h --half 1
    grpo opd-only-fresh-2h opd-only-1h "${G_student[@]}" --half 2
    sft_teacher sft-teacher
    bridge sft-teacher-bridge sft-teacher
    sft_teacher sft-teacher-1h --half 1
    bridge sft-teacher-bridge-1h sft-teacher-1h --half 1
    grpo sft-teacher-fresh-2h sft-teacher-bridge-1h "${G_student[@]}" --half 2
    grpo sft-teacher-replay-1h sft-teacher-bridge-1h "${G_student[@]}" --half 1
    bridge same-size-bridge cold-grpo
}
# --- Beyond the paper: fewer labels and more, and rewards between dense and sparse (Eq. 3).
beyond() {
    local n weight
    for n in 32 64 256 512; do # 128 are the routes above
        grpo teacher-rl-$n $teacher "${G_teacher[@]}" --data $runs/train-$n.jsonl
        bridge bridge-$n teacher-rl-$n --data $runs/train-$n.jsonl
        grpo cold-grpo-$n $student "${G_student[@]}" --data $runs/train-$n.jsonl
    done
    for weight in 0.25 0.5 0.75 1; do # 0 is the bridge
        distil opd.py lambda-$weight teacher-rl bridge-warmup "${opd[@]}" --sparse-weight $weight
        report lambda-$weight
    done
}

lines= job=
case $setting in
world) # two lines side by side, a core each
    make_world
    trap '[ -z "$job" ] || kill $job $(pgrep -P $job) 2> /dev/null' EXIT
    lines=2
    echo "=== teachers; beside it students, in $runs/logs/students.txt"
    (set -e; students) > $runs/logs/students.txt 2>&1 & job=$!
    teachers
    wait $job || { echo "students failed: $(tail -n 1 $runs/logs/students.txt)" >&2; exit 1; }
    job= ;;
world-full) # one after the other: several worlds may run side by side
    log=$runs/logs/all.txt
    echo "=== world of seed $SEED, in $log"
    (
        set -e
        make_world
        base_student # before the teachers' line, which wants it
        teachers
        students
        others
        beyond
    ) > $log 2>&1 & job=$!
    trap '[ -z "$job" ] || kill $job $(pgrep -P $job) 2> /dev/null' EXIT
    wait $job || { echo "seed $SEED failed: $(tail -n 1 $log)" >&2; exit 1; }
    job= ;;
world-gpu)
    make_world
    base_student
    teachers
    students ;;
*)
    teachers
    students
    others ;;
esac
echo "=== done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
python evaluate.py --table $runs
