drawHeatmaps();
fitted("rate", drawRate);
fitted("law", drawLaw);
drawKinds();
watchTable();
watchTips();
