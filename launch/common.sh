# shellcheck shell=bash
# What the launchers share: options, the contract of docs/launch.md, printing, restarts. Sourced, never run.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: the launchers need bash 4.4 or newer; this is $BASH_VERSION" >&2
  exit 2
fi

PYTHON=${PYTHON:-python}
# Options by name, with their defaults: a script adds its own. `no` marks a switch, which takes no value.
declare -A option=(
  [config]=${JAXEMBED_CONFIG-} [workdir]=${JAXEMBED_WORKDIR-} [dry-run]=no
  [restarts]=${JAXEMBED_RESTARTS:-3} [timeout]=${JAXEMBED_TIMEOUT:-300}
)
words=() # arguments that are no options
flags=() # further flags of jaxembed.train

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() { printf 'launch: %s\n' "$*" >&2; }

# Reads the command line into `option`, `words` and `flags`. Later flags win over those of JAXEMBED_FLAGS.
parse() {
  to_words "${JAXEMBED_FLAGS-}" JAXEMBED_FLAGS
  flags=("${parts[@]}")
  local name
  while (($#)); do
    name=${1%%=*} name=${name#--}
    case $1 in
      --help | -h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;;
      --) flags+=("${@:2}") && break ;;
      --*) known "$name" ;;&
      --*=*) option[$name]=${1#*=} ;;
      --*) if [[ ${option[$name]} == no ]]; then option[$name]=yes; else
        (($# > 1)) || fail "$1 needs a value: $1=VALUE"
        option[$name]=$2 && shift
      fi ;;
      *) words+=("$1") ;;
    esac
    shift
  done
  number restarts 0
  number timeout 6 # as jaxembed.train wants it
  # Processes are told by their command line and by what a launcher prints, by nothing that was meant for itself.
  unset JAXEMBED_{CONFIG,WORKDIR,FLAGS,START,COORDINATOR,PROCESSES,PROCESS}
}

known() {
  [[ $1 =~ ^[a-z][a-z-]*$ && -v option[$1] ]] || fail "unknown option --$1: flags of jaxembed.train come after --"
}

no_words() { ((${#words[@]} == 0)) || fail "unexpected argument ${words[0]}: every option is --name=value"; }

# number OPTION LEAST: refuses what is not a whole number of at least LEAST.
number() {
  if ! [[ ${option[$1]} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((option[$1] < $2)); then
    fail "--$1: want a whole number of at least $2, not '${option[$1]}'"
  fi
}

# to_words TEXT NAME: cuts TEXT into the words of `parts`, quotes and backslashes as in a shell.
to_words() {
  xargs true <<<"$1" 2>/dev/null || fail "$2: a quote is not closed: $1"
  mapfile -t -d '' parts < <(xargs -r printf '%s\0' <<<"$1")
}

# Names the command of one process in `train`, and in `surroundings` what all processes have in their environment.
need_run() {
  [[ -n ${option[config]} ]] || fail "--config is missing: name a config file (or set JAXEMBED_CONFIG)"
  [[ -n ${option[workdir]} ]] || fail "--workdir is missing: name the run's folder (or set JAXEMBED_WORKDIR)"
  train=("$PYTHON" -m jaxembed.train "--config=${option[config]}" "--workdir=${option[workdir]}" "${flags[@]}")
  surroundings=(
    "JAXEMBED_TIMEOUT=${option[timeout]}"
    "JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jaxembed/jax}"
  )
}

# Adds to `surroundings` what jax's documentation recommends for several GPUs (docs.jax.dev, gpu_performance_tips):
# collectives run beside the computation. It is off by default in XLA. Flags of the user's own come later, and win.
add_gpu_flags() {
  surroundings+=("XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}")
}

# Names in `remote` the command of another machine, where launch/host.sh runs one process.
need_remote() {
  need_run
  local name
  remote=(env "PYTHON=$PYTHON")
  for name in JAXEMBED_RESTART_PAUSE JAX_COMPILATION_CACHE_DIR LIBTPU_INIT_ARGS XLA_FLAGS; do
    [[ -z ${!name-} ]] || remote+=("$name=${!name}")
  done
  remote+=(launch/host.sh "${train[@]:3:2}" "--timeout=${option[timeout]}")
}

# Prints words as one would type them.
quoted() {
  local word line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Prints the command; with --dry-run on standard output.
show() {
  if [[ ${option[dry-run]} == yes ]]; then printf '+ %s\n' "$(quoted "$@")"; else
    printf '+ %s\n' "$(quoted "$@")" >&2
  fi
}

# Prints the command, and runs it unless --dry-run.
run() {
  show "$@"
  [[ ${option[dry-run]} == yes ]] || "$@"
}
