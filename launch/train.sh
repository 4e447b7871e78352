# Sourced by train_*.sh: trains with a run config on all GPUs of this machine, or of several machines.
#   train RUN_CONFIG [ARGUMENTS of launch/finetune.py ...]     a given --cfg-path, --ds-config or --resume wins
# HOSTFILE=hosts trains on the machines that it names, once launch/preflight.py has checked them. RANKS=2 starts two
# ranks instead of one for each GPU; without a GPU they share the CPU.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

train() {
    local where command
    if [ -n "${HOSTFILE:-}" ]; then
        where=(--hostfile "$HOSTFILE") # on DeepSpeed's port, which preflight checks
    else
        where=(--master_port "$(free_port)") # other runs of this machine have others
    fi
    command=(deepspeed --quiet "${where[@]}" ${RANKS:+--num_accelerators "$RANKS"}
        "$root/launch/finetune.py" --cfg-path "$root/run_configs/$1" --ds-config "$root/ds_configs/zero2.json"
        --resume auto "${@:2}")
    if [ -n "${HOSTFILE:-}" ]; then
        command=(python "$root/launch/preflight.py" --hostfile "$HOSTFILE" -- "${command[@]}")
    fi
    exec "${command[@]}"
}
