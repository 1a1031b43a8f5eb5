#!/usr/bin/env bash
# What runs on every TPU worker: the startup script and, copied beside what it
# installs, the program that `python -m launch.tpu` calls over ssh:
#
#   worker.sh                 at boot: install, then MOLE_COMMAND if there is one
#   worker.sh start COMMAND   start a job, unless one runs
#   worker.sh repair          install again, where that failed
#   worker.sh state | stop | log [LINES] [follow]
#
# launch/worker.py writes the MOLE_* settings above this text. No secret is among
# them: MOLE_SECRETS has names of secrets, which are read when a job starts.
# What is in RUN is gone after a boot, so a job never seems to run that does not.
set -euo pipefail

ROOT=${MOLE_ROOT:-/opt/mole_jax}
RUN=${MOLE_RUN:-/run/mole_jax}
LOG=${MOLE_LOG:-/var/log/mole_jax.log}
DISK=${MOLE_DISK:-/mnt/mole_jax}
PAUSE=${MOLE_PAUSE:-20} # Seconds, between attempts to install.
GRACE=${MOLE_GRACE:-120} # Seconds, for a job to save and leave.
WORK=$ROOT/work

say() { echo "$(date -u +%FT%TZ) $*"; }

# One line, which launch/babysit.py reads.
report() { echo "mole-worker $(hostname) $*"; }

phase() { cat "$RUN/phase" 2>/dev/null || echo booting; }

boot() {
  mkdir -p "$ROOT" "$RUN"
  rm -f "$RUN/why"
  exec >>"$LOG" 2>&1
  if ! mkdir "$RUN/started" 2>/dev/null; then
    say "already started in this boot"
    return
  fi
  if ! [[ "${BASH_SOURCE[0]}" -ef "$ROOT/worker.sh" ]]; then
    install -m 700 "${BASH_SOURCE[0]}" "$ROOT/worker.sh"
  fi
  echo installing >"$RUN/phase"
  # A process of its own: inside `if`, errexit holds for no command here.
  if bash "$ROOT/worker.sh" prepare; then
    echo ready >"$RUN/phase"
    say "ready"
  else
    say "installation failed"
    echo broken >"$RUN/phase"
    return
  fi
  if ((${#MOLE_COMMAND[@]})); then
    start "${MOLE_COMMAND[@]}"
  fi
}

# Installs once for each version of this script; mounts at each boot.
prepare() {
  local id
  id=$(sha256sum "$ROOT/worker.sh" | cut -d ' ' -f 1)
  if [[ $(cat "$ROOT/installed" 2>/dev/null) != "$id" ]]; then
    rm -rf "$ROOT/installed" "$ROOT/venv" "$WORK"
    mkdir -p "$WORK"
    python_is_there
    retry install_package
    echo "$id" >"$ROOT/installed"
  fi
  if [[ -n $MOLE_MOUNT ]]; then
    retry mount_disk
    # A command with --workdir=runs/x finds its run again on another machine.
    for name in runs data weights; do
      mkdir -p "$DISK/$name"
      rm -rf "${WORK:?}/$name"
      ln -s "$DISK/$name" "$WORK/$name"
    done
  fi
}

# Three attempts, each a process of its own, so that errexit holds in it.
retry() {
  local i
  for i in 1 2 3; do
    say "$1, attempt $i"
    if bash "$ROOT/worker.sh" "$1"; then return; fi
    if ((i < 3)); then sleep "$PAUSE"; fi
  done
  say "$1 failed three times"
  echo "$1 failed three times" >"$RUN/why"
  return 1
}

# The images of TPU VMs may have an older Python than the lock is for.
python_is_there() {
  if ! command -v "$MOLE_PYTHON" >/dev/null; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -qy \
      "$MOLE_PYTHON" "$MOLE_PYTHON-venv"
  fi
}

install_package() {
  "$MOLE_PYTHON" -m venv --clear "$ROOT/venv"
  printf '%s\n' "$MOLE_LOCK" >"$ROOT/lock.txt"
  local pip=("$ROOT/venv/bin/python" -m pip install -q --require-hashes)
  # What builds the packages that come as source has to be there before them.
  grep -E '^(packaging|setuptools|wheel)==' "$ROOT/lock.txt" >"$ROOT/build.txt"
  "${pip[@]}" -r "$ROOT/build.txt"
  "${pip[@]}" --no-build-isolation -r "$ROOT/lock.txt"
  rm -rf "$WORK"
  local package
  case $MOLE_SOURCE in
    git)
      git clone -q "$MOLE_URL" "$WORK"
      git -C "$WORK" checkout -q --detach "$MOLE_COMMIT"
      package=$WORK
      ;;
    wheel)
      mkdir -p "$WORK"
      package=$ROOT/${MOLE_URL##*/}
      gcloud storage cp -q "$MOLE_URL" "$package"
      echo "$MOLE_SHA256  $package" | sha256sum --check --quiet
      base64 -d <<<"$MOLE_CONFIGS" | tar -xJ -C "$WORK"
      ;;
  esac
  "$ROOT/venv/bin/python" -m pip install -q --no-deps --no-build-isolation \
    "$package"
}

mount_disk() {
  mkdir -p "$DISK"
  if mountpoint -q "$DISK"; then return; fi
  local source=${MOLE_MOUNT#*:}
  case $MOLE_MOUNT in
    nfs:*)
      command -v mount.nfs >/dev/null || apt-get install -qy nfs-common
      mount -t nfs -o hard "$source" "$DISK"
      ;;
    gcs:*)
      command -v gcsfuse >/dev/null || apt-get install -qy gcsfuse
      gcsfuse --implicit-dirs "$source" "$DISK"
      ;;
  esac
}

is_running() {
  [[ -f $RUN/leader && ! -f $RUN/exit ]] &&
    kill -0 "$(cat "$RUN/leader")" 2>/dev/null
}

start() {
  mkdir -p "$RUN"
  (
    flock 9
    if [[ $(phase) != ready ]]; then
      state
      return
    fi
    if is_running; then
      report running
      return
    fi
    rm -f "$RUN/leader" "$RUN/child" "$RUN/exit" "$RUN/last"
    setsid bash "$ROOT/worker.sh" job "$@" </dev/null >>"$LOG" 2>&1 9>&- &
    for _ in {1..50}; do
      if [[ -s $RUN/leader ]]; then break; fi
      sleep 0.1
    done
    report running
  ) 9>"$RUN/lock"
}

repair() {
  if [[ $(phase) == broken ]]; then
    rm -rf "$RUN/started"
    echo installing >"$RUN/phase"
    setsid bash "$ROOT/worker.sh" </dev/null >/dev/null 2>&1 &
  fi
  state
}

# The job's own session: secrets, the command, and its exit code on file.
job() {
  echo "$$" >"$RUN/leader"
  local code=0 pair value
  cd "$WORK"
  export PATH=$ROOT/venv/bin:$PATH
  say "start: $*"
  for pair in "${MOLE_SECRETS[@]}"; do
    if ! value=$(gcloud secrets versions access latest \
      --secret="${pair#*=}" ${MOLE_PROJECT:+"--project=$MOLE_PROJECT"}); then
      say "secret ${pair#*=} cannot be read by this machine's account"
      finish 1
    fi
    export "${pair%%=*}=$value"
  done
  "$@" &
  echo "$!" >"$RUN/child"
  wait "$!" || code=$?
  tail -n 1 "$LOG" | tr -cd '[:print:]' | cut -c 1-200 >"$RUN/last"
  say "exit code $code"
  finish "$code"
}

finish() {
  echo "$1" >"$RUN/exit.tmp"
  mv "$RUN/exit.tmp" "$RUN/exit"
  exit "$1"
}

state() {
  local now
  now=$(phase)
  if [[ $now == broken ]]; then
    report "broken $(cat "$RUN/why" 2>/dev/null || echo at installing)"
  elif [[ $now != ready ]]; then
    report "$now"
  elif [[ -f $RUN/exit ]]; then
    report "exited $(cat "$RUN/exit") $(cat "$RUN/last" 2>/dev/null)"
  elif is_running; then
    report running
  elif [[ -f $RUN/leader ]]; then
    report "exited 137" # Its session was killed.
  else
    report idle
  fi
}

# SIGTERM to the command alone, which saves; then an end to its session.
stop() {
  if is_running; then
    kill -TERM "$(cat "$RUN/child")" 2>/dev/null || true
    for ((i = 0; i < GRACE * 10; i++)); do
      if ! is_running; then break; fi
      sleep 0.1
    done
    if is_running; then
      kill -KILL -- "-$(cat "$RUN/leader")" || true
      echo 137 >"$RUN/exit"
    fi
  fi
  state
}

log() {
  if [[ ${2:-} == follow ]]; then
    exec tail -n "${1:-100}" -F "$LOG"
  fi
  tail -n "${1:-100}" "$LOG"
}

case ${1:-boot} in
  boot | prepare | install_package | mount_disk | start | repair | \
    job | state | stop | log)
    "${@:-boot}"
    ;;
  *)
    echo "worker.sh: unknown command '$1'" >&2
    exit 2
    ;;
esac
