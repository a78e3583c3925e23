// The transformation of answers imports it, and calls it for exemplars only.
exports.getDataSourceSrv = () => {
  throw new Error("there is no data source outside of a browser");
};
