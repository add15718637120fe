"""Is a bundle still the model? It is compared with its checkpoint in transformers, tensor by tensor.

report = report_from_bundle(Bundle.open(path), checkpoint)
print(report.to_text())
"""

from mllama_exporter.validate.checks import Check
from mllama_exporter.validate.page import PAGE_NAME, page_from_report
from mllama_exporter.validate.pipeline import report_from_bundle
from mllama_exporter.validate.report import REPORT_NAME, Report
from mllama_exporter.validate.task import questions_from_jsonl

__all__ = [
    "PAGE_NAME",
    "REPORT_NAME",
    "Check",
    "Report",
    "page_from_report",
    "questions_from_jsonl",
    "report_from_bundle",
]
