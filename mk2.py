import sys; sys.path.append("/tmp/w/fixc-try/pa")
import pyarrow as pa, json, os
from pathlib import Path
d=Path("/tmp/w/fixc-try/d")
def one(p):
    p.mkdir(parents=True,exist_ok=True)
    t=pa.table({"conversations":[[{"from":"human","value":"q"},{"from":"gpt","value":"a"}]]*3})
    with pa.ipc.new_stream(p/"data-00000-of-00001.arrow",t.schema) as w: w.write_table(t)
    (p/"state.json").write_text(json.dumps({"_data_files":[{"filename":"data-00000-of-00001.arrow"}],"_fingerprint":"abc","_format_columns":None,"_format_kwargs":{},"_format_type":None,"_output_all_columns":False,"_split":None}))
    (p/"dataset_info.json").write_text(json.dumps({"citation":"","description":"","features":{"conversations":[{"from":{"dtype":"string","_type":"Value"},"value":{"dtype":"string","_type":"Value"}}]},"homepage":"","license":""}))
one(d/"one"); one(d/"many/train"); one(d/"many/test")
(d/"many/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
