# shellcheck shell=bash
# Processes of this machine: started together, told to stop together, started again when one fails. Sourced by scripts
# that define `command_of I`, which names in `process` what process I runs.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

readonly GRACE=10 # seconds that the others have to end by themselves once one has failed
process=()
told=0      # how often this launcher was told to stop
children=() # process number → process id, of those that run

# First SIGTERM or SIGINT: all save and leave. Second: at once.
stop_children() {
  told=$((told + 1))
  say "told to stop: $( ((told == 1)) && echo "the run saves and ends" || echo "now")"
  ((${#children[@]} == 0)) || kill "-$( ((told == 1)) && echo TERM || echo KILL)" "${children[@]}" 2>/dev/null || true
}

# supervise N: runs N processes until they are done, and again, after a pause that doubles, where they failed in a way
# that another start may mend. Returns their exit code (docs/launch.md says what it means).
supervise() {
  local i restart again code pause=${JAXEMBED_RESTART_PAUSE:-5}
  if [[ ${option[dry-run]} == yes ]]; then
    for ((i = 0; i < $1; i++)); do command_of "$i" && show "${process[@]}"; done
    return 0
  fi
  [[ -n $(type -P "$PYTHON") ]] || fail "PYTHON=$PYTHON: no such program; name the Python that has jaxembed"
  trap stop_children TERM INT
  for ((restart = 1; ; restart++)); do
    code=0
    run_together "$1" || code=$?
    ((code > 2 && told == 0)) || return "$code"
    if ((restart > option[restarts])); then
      say "code $code after ${option[restarts]} restarts: giving up"
      return "$code"
    fi
    say "code $code: restart $restart of ${option[restarts]} in $pause s"
    again=$((SECONDS + pause))
    while ((told == 0 && SECONDS < again)); do sleep 0.2; done
    ((told == 0)) || return "$code"
    pause=$((2 * pause))
  done
}

# Marks the lines of process I; outlives Ctrl-C, so that nothing of what it still says is lost.
label() {
  trap '' INT TERM
  exec awk -v mark="[$1] " '{ print mark $0; fflush() }' >&2
}

# Starts processes 0 … N-1 and waits for all. Once one has failed, the others have GRACE seconds. Returns the code of
# the first that failed; but 1 and 2, which say that another start would not help, count before what others made of it.
run_together() {
  local i ended code=0 deadline=
  children=()
  for ((i = 0; i < $1; i++)); do
    command_of "$i"
    show "${process[@]}"
    if ((i == 0)); then "${process[@]}" & else "${process[@]}" > >(label "$i") 2>&1 & fi
    children[i]=$!
  done
  ((told == 0)) || kill -TERM "${children[@]}" # the signal came while they were started
  while ((${#children[@]})); do
    sleep 0.2
    for i in "${!children[@]}"; do
      ! kill -0 "${children[i]}" 2>/dev/null || continue
      ended=0
      wait "${children[i]}" 2>/dev/null || ended=$?
      unset "children[i]"
      ((ended)) || continue
      say "process $i ended with code $ended"
      ((code && ended > 2)) || code=$ended
      deadline=${deadline:-$((SECONDS + GRACE))}
    done
    if [[ -n $deadline ]] && ((SECONDS >= deadline && ${#children[@]})); then
      say "ending process ${!children[*]}"
      kill -KILL "${children[@]}" 2>/dev/null || true
    fi
  done
  return "$code"
}
