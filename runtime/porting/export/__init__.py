"""Exported packages: what is cut, writing it whole, and checking it against the graph.

    a model, a layout or plan, formats  -> ExportJob                      options.py, job.py
    each layer type, traced and cut     -> chains of graphs               units.py
    a graph                             -> files of a format              writers.py, ascend.py
    a checkpoint                        -> each device's weight file      shares.py
    all of it                           -> a folder and its manifest      package.py

`verify.py` runs the finished package beside the graph; `check.py` says what is wrong with one that is there. The
nouns of a package are `runtime.deployment.manifest`; running one is `runtime.execution.package`.
"""
