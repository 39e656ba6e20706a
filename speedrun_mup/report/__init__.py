"""Reports: what runs, sweeps and checks have shown, as a page, as pictures and as text."""

from speedrun_mup.report.runs import plot_loss_curve

__all__ = ["plot_loss_curve"]
