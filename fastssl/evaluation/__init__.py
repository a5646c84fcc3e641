"""What a checkpoint is worth: the protocols that `fastssl evaluate` runs, from paths to numbers.

options.py, accuracy.py     what protocols share: their options; top-1, intervals, tables
scoring.py                  a classifier's accuracy over a data set
ssl.py                      a method's own losses over a data set
frozen/                     the backbone stays as it is: features, knn, linear, attentive, embed
tuned/                      the whole network is trained: finetune, segment, detect
"""
