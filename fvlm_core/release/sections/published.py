"""Published results of other models on the benchmarks that were run, for comparison."""

from fvlm_core.eval.summary import published_tables
from fvlm_core.release.evidence import Evidence
from fvlm_core.release.figures import Figures
from fvlm_core.release.report import Section


def section(evidence: Evidence, figures: Figures) -> Section:
    tables = published_tables(evidence.results)
    if not tables:
        return Section(title="Published models", missing="no benchmark with published results was run")
    return Section(title="Published models", blocks=[*tables])
