#!/usr/bin/env bash
# publish.sh FOLDER BRANCH MESSAGE [git push's options]: what lies in FOLDER becomes the only commit of a branch of `origin`.
# The checkout, its index and its branches stay as they are.
set -euo pipefail
folder=$(cd "$1" && pwd) branch=$2 message=$3; shift 3
export GIT_DIR GIT_WORK_TREE=$folder GIT_INDEX_FILE
GIT_DIR=$(cd "$(dirname "$0")" && git rev-parse --absolute-git-dir)
index=$(mktemp -d); trap 'rm -rf "$index"' EXIT
GIT_INDEX_FILE=$index/index
cd "$folder"
git add --all --force .
tree=$(git write-tree)
who=(-c user.name=github-actions -c user.email=github-actions@users.noreply.github.com)
git push "$@" origin "$(git "${who[@]}" commit-tree "$tree" -m "$message"):refs/heads/$branch"
