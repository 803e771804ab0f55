#!/usr/bin/env bash
# Download released weights into the cache (~/.cache/cgd_mae): checked, offline from then on.
# Afterwards the name alone stands wherever a checkpoint is wanted. Usage:
#   bash scripts/download_checkpoints.sh [NAME...]      (default: mae_vit_base)
# Which file for what (all of them: util/registry.json; MB are by arithmetic, float32):
#   mae_vit_base, mae_vit_large, mae_vit_huge       facebook's MAE on ImageNet-1K, encoder: to start fine-tuning from, the
#                                                   baseline row of every table; 340, 1,210, 2,520 MB
#   mae_vit_base_full, _large_full, _huge_full      the same with its decoder: to go on pre-training from (--init), for
#                                                   reconstructions (tools.report images); 450, 1,320, 2,630 MB
#   cgd_mae_vit_base, mae_automobile1m_vit_base     the paper's two encoders of Automobile1M: vehicles; 340 MB. Their addresses
#   cgd_mae_vit_base_full, mae_automobile1m_vit_base_full   (and with decoders) are not known here: fill in their url in
#                                                   util/registry.json once, or give a path in place of the name
# facebook's weights are CC-BY-NC 4.0 (no commercial use), and so is what is trained from them.
# Environment: PYTHON (python).
set -euo pipefail
cd "$(dirname "$0")/.."
if (( $# == 0 )); then set -- mae_vit_base; fi
for name in "$@"; do
    "${PYTHON:-python}" -m tools.checkpoint download "$name"
done
