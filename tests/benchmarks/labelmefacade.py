# LabelMeFacade at 240x180 with ImageNet features, by the recipe of CamVid: see study.py, which writes the data.
_base_ = './camvid.py'
root = '{{$STUDY_DATA:data/labelmefacade_240x180}}'
metainfo = dict(
    classes=('Building', 'Car', 'Door', 'Pavement', 'Road', 'Sky', 'Vegetation', 'Window'),
    palette=[[128, 0, 0], [128, 0, 128], [128, 128, 0], [128, 128, 128], [128, 64, 0], [0, 128, 128], [0, 128, 0],
             [0, 0, 128]])
data = dict(data_root=root, metainfo=dict(_delete_=True, **metainfo))
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = test_cfg = test_evaluator = None  # it has no third split
model = dict(decode_head=dict(num_classes=8))
