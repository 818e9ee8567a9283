set -euo pipefail

number=${SLURM_JOB_ID:?is set by Slurm alone: submit this file with sbatch}
# One of an array is ARRAY_TASK everywhere: the plain number of its last is that of all of them.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$number}
attempt=${SLURM_RESTART_COUNT:-0}
state=$folder/$job-$attempt        # what the roles below tell each other: .stop, .exit, .end
scratch=/tmp/twofour-$job-$attempt # of this job on every node: Ray's sockets and logs
ports=$((20000 + 10 * (number % 1000)))

# What every node looks at first; this file may not be there.
# shellcheck disable=SC2016
is_shared='if [ ! -d "$0" ]; then
    echo "error: $(hostname) has no $0: run.dir must be on a disk that all nodes see" >&2
    exit 2
fi
exec "$@"'

# Once, on the first node: start the other roles, pass signals on, decide what comes after.
batch() {
    trap 'rm -f "$folder/token" "$state".{stop,exit,end}' EXIT
    queue_again=undecided
    trap 'queue_again=${queue_again/undecided/yes}; touch "$state.stop"' USR1 # time limit near
    trap 'queue_again=no; touch "$state.stop"' USR2 TERM # jobs.manage cancel; others' scancel
    local address port step code left=60
    address=$(node_address)
    port=$(free_port "$address" $((ports + 0)))
    dashboard=$(free_port 127.0.0.1 $((ports + 1)))
    export RAY_ADDRESS=$address:$port RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=$start_timeout_s
    export dashboard
    # A token of this job alone keeps everybody else's commands out of its Ray.
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$folder/token")
    echo "job $job, attempt $((attempt + 1)) on $SLURM_JOB_NODELIST: Ray at $RAY_ADDRESS"
    echo "dashboard: ssh -N -L 8265:localhost:$dashboard $SLURMD_NODENAME, then" \
        "http://localhost:8265; its token: cat $(printf %q "$folder/token")"

    rm -f "$folder/bad-nodes"
    if [ "$preflight" = yes ] && ! look_at_nodes; then
        ask_for_others
        end 2
    fi

    # This file in the shared folder, since Slurm's copy of it is on the first node alone.
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" \
        --kill-on-bad-exit=1 --wait=0 bash -c "$is_shared" "$folder" \
        "${inside[@]}" bash "$folder/$script" node &
    step=$!
    while kill -0 "$step" 2>/dev/null && [ "$left" -gt 0 ]; do
        sleep 1 & # waited for, so that a signal is heard at once
        wait $! || true
        if [ -e "$state.exit" ]; then left=$((left - 1)); fi
    done
    code=$(cat "$state.exit" 2>/dev/null || echo 1)
    if [ ! -e "$state.exit" ]; then
        echo "job $job: its command has not come to an end of its own; the lines above say why," \
            "and $folder/$job.ray*.log" >&2
    fi
    # Ended by the signal itself, between two stages for one: what was saved before is there.
    if [ "$code" -gt 128 ] && [ -e "$state.stop" ]; then code=75; fi
    # A node was lost and did not come back: Slurm may have another.
    if [ "$code" = 69 ] && [ "$queue_again" = undecided ]; then code=75 queue_again=yes; fi
    if [ "$code" = 75 ] && [ "$queue_again" = yes ]; then
        if [ "$attempt" -lt "$max_requeues" ]; then
            echo "job $job goes back into the queue, to carry on from what is saved"
            rm -f "$folder/token" "$state".{stop,exit,end}
            # Not heard while this node's own link is cut.
            until scontrol requeue "$job"; do sleep 10; done
            sleep 120 # Slurm ends this process
        fi
        echo "job $job was put into the queue again $attempt times, the most allowed" \
            "(cluster.slurm.max_requeues); carry on with: python -m jobs.manage resume" >&2
    fi
    if [ "$code" = 2 ]; then ask_for_others; fi
    end "$code"
}

# Slurm forgets its jobs some minutes after their end, the folder does not.
end() {
    echo "$1" >"$folder/$job.exit"
    exit "$1"
}

# Before Ray starts, which would name no node: what keeps one from its part, said and in bad-nodes.
look_at_nodes() {
    local said name why
    said=$(timeout 120 srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
        bash -s -- look <"$folder/$script") || true
    if ! grep -qE '^(fit|bad) ' <<<"$said"; then
        echo "error: preflight: srun reached none of $SLURM_JOB_NODELIST; see the lines above" >&2
        return 1
    fi
    for name in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        if grep -qxF "fit $name" <<<"$said"; then continue; fi
        why=$(sed -n "s/^bad $name: //p" <<<"$said")
        echo "error: preflight: $name: ${why:-does not answer; use another node}" >&2
        echo "$name" >>"$folder/bad-nodes"
    done
    [ ! -e "$folder/bad-nodes" ]
}

# Of one node, read from stdin there: this file may be what it does not have.
look() {
    local why='' found path shared="mount the shared disk on it, or choose a shared folder"
    for path in "$folder/$script" "$root/cluster" "$directory" ${container:+"$container"}; do
        if [ ! -r "$path" ]; then why="does not have $path; $shared"; fi
    done
    if [ -z "$container" ] && [ ! -x "${command[0]}" ]; then
        why="does not have ${command[0]}; $shared"
    fi
    if [ "$gpus" -gt 0 ] && command -v nvidia-smi >/dev/null; then
        found=$(nvidia-smi -L | grep -c '^GPU ' || true)
        if [ "$found" -lt "$gpus" ]; then
            why="$found GPUs found, $gpus wanted; have it looked at, use another node"
        fi
    fi
    if [ -n "$why" ]; then echo "bad $SLURMD_NODENAME: $why"; else echo "fit $SLURMD_NODENAME"; fi
}

# Back into the queue without the nodes of bad-nodes, unless there are no others or it was enough.
ask_for_others() {
    local bad tried=0 excluded
    if [ ! -s "$folder/bad-nodes" ] || [ "$queue_again" = no ]; then return 0; fi
    bad=$(paste -sd, "$folder/bad-nodes")
    if [ -e "$folder/$job.excluded" ]; then tried=$(wc -l <"$folder/$job.excluded"); fi
    if [ "$tried" -ge "$max_replacements" ] || [ "$attempt" -ge "$max_requeues" ]; then
        echo "job $job got other nodes for bad ones $tried times, the most allowed" \
            "(cluster.slurm.max_replacements, max_requeues)" >&2
        return 0
    fi
    excluded=$(scontrol show job --oneliner "$job" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    excluded=${excluded/#(null)/}
    excluded=${excluded:+$excluded,}$bad
    if ! sbatch --test-only --exclude="$excluded" "$folder/$script" >/dev/null 2>&1; then
        echo "no other nodes of this Slurm would do in place of $bad" >&2
        return 0
    fi
    echo "$bad" >>"$folder/$job.excluded"
    echo "job $job goes back into the queue, for other nodes in place of $bad"
    rm -f "$folder/token" "$state".{stop,exit,end}
    trap '' TERM # of the requeue; the list can be changed only after it
    scontrol requeue "$job"
    scontrol update JobId="$job" ExcNodeList="$excluded"
    sleep 120 # Slurm ends this process
}

# On every node: bring Ray up, run the command on the first, take Ray down.
node() {
    local ray log=$folder/$job.ray$SLURM_NODEID.log begin joined=no tries=0 old
    # Slurm may miss Ray's daemons when it ends a job; this user has no other job on the node.
    if [ "${inside[0]-}" != unshare ]; then
        pkill -KILL -u "$(id -u)" -f '/tmp/twofour-[0-9_]+-[0-9]+/' || true
        for old in /tmp/twofour-[0-9]*-[0-9]*; do
            if [ -O "$old" ]; then rm -rf "$old"; fi
        done
    fi
    if ! mkdir -m 700 "$scratch"; then refuse "$scratch cannot be made"; fi
    trap 'rm -rf "$scratch"' EXIT # and in it Ray's own folder, which Ray opens to everybody
    if [ ! -s "$folder/token" ]; then
        refuse "$folder/token, the token of the job's Ray, is empty or cannot be read"
    fi
    # What Ray says of itself goes into a log of each node, the command's lines into the job's.
    while true; do
        touch "$log"
        begin=$(wc -c <"$log")
        ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$nodes" --num-cpus "$cpus" \
            --num-gpus "$gpus" --temp-dir "$scratch/ray" --disable-usage-stats \
            --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" \
            --ray-client-server-port "$(free_port 127.0.0.1 $((ports + 2)))" \
            --dashboard-agent-listen-port "$(free_port 127.0.0.1 $((ports + 3)))" \
            --min-worker-port 0 --max-worker-port 0 \
            -- bash "$folder/$script" driver >>"$log" 2>&1 &
        ray=$!
        while kill -0 "$ray" 2>/dev/null; do
            if is_over; then take_down "$ray"; fi
            sleep 1
        done
        wait "$ray" || true # the command's exit code is in .exit; Ray's is that of its shutdown
        if is_over; then break; fi
        if tail -c "+$((begin + 1))" "$log" | grep -q 'Ray runtime started'; then joined=yes; fi
        tries=$((tries + 1))
        if [ "$SLURM_NODEID" = 0 ] || { [ "$joined" = no ] && [ "$tries" = 3 ]; }; then
            if [ "$SLURM_NODEID" = 0 ] && listens "${RAY_ADDRESS%:*}" "${RAY_ADDRESS##*:}"; then
                refuse "the port of $RAY_ADDRESS was taken by another program; submit it again"
            fi
            refuse "Ray at $RAY_ADDRESS cannot be started or joined: $(last_error "$log")"
        fi
        # Cut off from the others, it was given up by Ray on both sides: it joins again, as new.
        sleep 5
    done
}

# Say why this node has no part in the job, and with it end the other nodes' part.
refuse() {
    echo "error: $(hostname): $1" >&2
    touch "$state.end"
    exit 0
}

# End what waits on though there is nothing to wait for: the command has ended, or cannot begin.
take_down() {
    if [ "$SLURM_NODEID" -gt 0 ]; then
        pkill -P "$1" || kill "$1" || true # `ray start --block`, or what waits for the head
    elif [ ! -e "$state.exit" ]; then
        kill "$1" || true
        ray stop >/dev/null 2>&1 || true
    fi
}

# What a log of Ray ends in, on one line.
last_error() {
    sed 's/\x1b\[[0-9;]*m//g' "$1" | grep -aiE 'error|exception|failed|timed out' | tail -n 1 |
        cut -c 1-200 || true
}

# Whether the command, Ray on the first node, or the job has ended.
is_over() {
    [ -e "$state.exit" ] || [ -e "$state.end" ] || [ ! -e "$folder/token" ]
}

# On the first node, inside Ray: the command. Signals go to it alone; others would end Ray.
driver() {
    local command_id code=0 asked=no
    "${command[@]}" >>"$folder/$job.log" 2>&1 &
    command_id=$!
    while kill -0 "$command_id" 2>/dev/null; do
        if [ -e "$state.stop" ] && [ "$asked" = no ]; then
            asked=yes
            kill -TERM "$command_id"
        fi
        sleep 1
    done
    wait "$command_id" || code=$?
    echo "$code" >"$state.exit.new"
    mv "$state.exit.new" "$state.exit"
    exit "$code"
}

# The address of this node that the other nodes reach.
node_address() {
    local all
    if [ -n "$interface" ]; then
        all=$(ip -o -4 addr show dev "$interface" | awk '{ sub("/.*", "", $4); print $4 }')
    else
        all=$(hostname -I)
    fi
    echo "${all%%[[:space:]]*}"
}

# The first port from $2 on, in steps of a job's ten, that nobody listens to at the address $1.
free_port() {
    local port=$2
    while listens "$1" "$port"; do port=$((port + 10)); done
    echo "$port"
}

# Whether somebody listens at the address $1, port $2.
listens() {
    (: <"/dev/tcp/$1/$2") 2>/dev/null
}

if [ "${1-}" = look ]; then
    look
    exit 0
fi
for path in "$root" "$directory" "$folder"; do
    if [ -d "$path" ]; then continue; fi
    echo "error: $(hostname) has no $path: the project must be on a disk that all nodes see" >&2
    exit 2
done
cd "$directory"
export PYTHONPATH=$root OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TWOFOUR_SUBMITTED=slurm
if [ -n "$interface" ]; then export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface; fi
# A container gets what they set through the environment of the first role, and has no modules.
if [ -z "$container" ] || [ -z "${1-}" ]; then
    set +u # what others wrote may read what is not set
    for module in "${modules[@]}"; do module load "$module"; done
    # shellcheck disable=SC1090
    if [ -n "$setup" ]; then source "$setup"; fi
    set -u
fi
if [ -n "$bin" ]; then export PATH=$bin:$PATH; fi
unset RAY_AUTH_TOKEN # of another Ray's, it would come first
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
"${1:-batch}"
