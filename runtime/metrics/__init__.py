"""One ruler for validation and for the INT8 gate, a module per task.

Everywhere a score at or above a threshold means "positive". What is read off a curve of such
thresholds is in ``runtime.curves``; scikit-learn's metrics would each sort everything once more,
and the tests hold these ones against them.
"""

from engineworks.runtime.metrics.anomalies import (
    AnomalyMetrics,
    aupro,
    f1max,
    false_reject_threshold,
)
from engineworks.runtime.metrics.boxes import (
    DetectionMetrics,
    precision_20px,
    st_iou,
    success_auc,
)
from engineworks.runtime.metrics.candidates import CandidateMetrics
from engineworks.runtime.metrics.classes import ClassificationMetrics, log_softmax
from engineworks.runtime.metrics.vectors import leave_one_out

__all__ = [
    "AnomalyMetrics",
    "CandidateMetrics",
    "ClassificationMetrics",
    "DetectionMetrics",
    "aupro",
    "f1max",
    "false_reject_threshold",
    "leave_one_out",
    "log_softmax",
    "precision_20px",
    "st_iou",
    "success_auc",
]
