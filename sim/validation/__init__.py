"""How true the twin is: backtest, and the forecast before a run."""
